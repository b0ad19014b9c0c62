"""Launches of compiled Triton kernels through the CUDA driver, without Triton.

``CudaLauncher`` is one loaded kernel. ``prepare`` fixes everything about one launch (addresses, step scalars, grid,
stream) in C structures, so that launching is a single foreign call with constant arguments: a launch recorded in a CUDA
graph and one made eagerly are the same object. Another GPU maker's driver would replace this module and
:mod:`graphserve.runtime.cuda_driver`; :class:`ArgumentBuffer` knows neither.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from graphserve.errors import DeviceError
from graphserve.kernels.triton.compiled import CompiledKernel
from graphserve.kernels.triton.grid import grid_size
from graphserve.kernels.triton.kernel import TritonArgument, TritonKernel
from graphserve.runtime.cubin import KernelParameter, kernel_parameters
from graphserve.runtime.cuda_driver import (
    PROGRAMMATIC_STREAM_SERIALIZATION,
    CudaDriver,
    LaunchAttribute,
    LaunchConfig,
)

_DEFAULT_SHARED_BYTES = 48 * 1024  # more needs the function attribute
_WARP = 32
_POINTER_SIZE = 8
_POINTER_ALIGNMENT = 16  # what the kernels were compiled for
_GRID_LIMITS = (2**31 - 1, 65535, 65535)


class ArgumentBuffer:
    """Values of one launch's parameters, laid out as the binary's own table says.

    Parameters beyond the kernel's own ones are the compiler's scratch pointers; they are null, since compiling refuses
    a kernel that would use them.

    Args:
        kernel: names the parameters in errors.
        arguments: the kernel's own parameters.
        parameters: the binary's table.

    Raises:
        DeviceError: number or size of the parameters differ between the two.
    """

    def __init__(self, kernel: str, arguments: Sequence[TritonArgument], parameters: Sequence[KernelParameter]) -> None:
        hidden = parameters[len(arguments) :]
        sizes = [_POINTER_SIZE if a.type.startswith("*") else 4 for a in arguments] + [_POINTER_SIZE] * len(hidden)
        if len(sizes) != len(parameters) or sizes != [p.size for p in parameters]:
            raise DeviceError(
                f"{kernel} is launched with arguments of {sizes[: len(arguments)]} bytes, its binary takes "
                f"{[p.size for p in parameters]}: the binary belongs to another version of the kernel"
            )
        self._kernel = kernel
        self._fields = list(zip(arguments, parameters, strict=False))
        size = max((p.offset + p.size for p in parameters), default=0)
        buffer = ctypes.create_string_buffer(max(size, 1))
        self._bytes = memoryview(buffer).cast("B")  # keeps the buffer
        base = ctypes.addressof(buffer)
        self.pointers = (ctypes.c_void_p * max(len(parameters), 1))(*(base + p.offset for p in parameters))

    def fill(self, tensors: Sequence[int | None], scratch: int, scalars: Mapping[str, int]) -> None:
        """Write all values.

        Args:
            tensors: device addresses of the launch's tensor arguments followed by its outputs, None for absent ones.
            scratch: device address of scratch memory, 0 for none.
            scalars: step scalars by name.

        Raises:
            DeviceError: an address is missing or not aligned, or a scalar is missing or does not fit 32 bits.
        """
        for argument, parameter in self._fields:
            value = self._value(argument, tensors, scratch, scalars)
            self._bytes[parameter.offset : parameter.offset + parameter.size] = value.to_bytes(parameter.size, "little")

    def _value(
        self, argument: TritonArgument, tensors: Sequence[int | None], scratch: int, scalars: Mapping[str, int]
    ) -> int:
        where = f"{self._kernel}: argument {argument.name}"
        if not argument.type.startswith("*"):
            name = str(argument.source)
            if name not in scalars:
                raise DeviceError(f"{where} is the step scalar {name}; given: {', '.join(scalars) or 'none'}")
            if not 0 <= scalars[name] < 2**31:
                raise DeviceError(f"{where} is {scalars[name]}: step scalars are 0 to 2**31 - 1")
            return scalars[name]
        address = tensors[argument.source] if isinstance(argument.source, int) else scratch
        if not address:
            raise DeviceError(f"{where} has no memory: launch it with an address")
        if argument.aligned and address % _POINTER_ALIGNMENT:
            raise DeviceError(f"{where} is at {address:#x}: the kernel needs a multiple of {_POINTER_ALIGNMENT} bytes")
        return address


class CudaLaunch:
    """One launch, ready to be made any number of times.

    Attributes:
        name: the kernel's, as the driver knows it.

    Invariant: the C structures it holds are the ones that the driver reads, and nothing of them is rebuilt per launch.
    The addresses, and what :class:`CudaLauncher` loaded, must outlive it.
    """

    def __init__(
        self, driver: CudaDriver, name: str, function: int, config: LaunchConfig, arguments: ArgumentBuffer
    ) -> None:
        self._driver = driver
        self.name = name
        self._function = ctypes.c_void_p(function)
        self._config = config
        self._arguments = arguments  # keeps the memory that the pointers point into
        self._launch = driver.launch_kernel
        self._config_reference = ctypes.byref(config)
        self._is_empty = 0 in (config.grid_x, config.grid_y, config.grid_z)  # the driver refuses an empty grid

    def __call__(self) -> None:
        """Enqueue the kernel on its stream.

        Raises:
            DeviceError: the driver refused the launch, or reports a failure of earlier work.
        """
        if self._is_empty:
            return
        result = self._launch(self._config_reference, self._function, self._arguments.pointers, None)
        if result:
            self._driver.check(result, "cuLaunchKernelEx", self.name)

    def set_stream(self, stream: int) -> None:
        """Enqueue on another stream from now on (a graph is captured on its own)."""
        self._config.stream = stream


class CudaLauncher:
    """A compiled kernel loaded into the current context.

    Args:
        driver: the driver, with a context current on this thread.
        kernel: what was compiled.
        compiled: its binary for a ``cuda`` target.

    Raises:
        DeviceError: the driver refuses the binary or its shared memory, or its parameters are not the kernel's.
    """

    def __init__(self, driver: CudaDriver, kernel: TritonKernel, compiled: CompiledKernel) -> None:
        if not compiled.target.startswith("cuda:"):
            raise DeviceError(f"{kernel.symbol} was compiled for {compiled.target}: CUDA needs a cuda target")
        self._driver = driver
        self._kernel = kernel
        self._compiled = compiled
        self._parameters = kernel_parameters(compiled.binary, compiled.name)
        ArgumentBuffer(compiled.name, kernel.arguments, self._parameters)  # a mismatch shows before the first launch
        self._module = driver.load_module(compiled.binary, compiled.name)
        self._function = driver.get_function(self._module, compiled.name)
        if compiled.shared_bytes > _DEFAULT_SHARED_BYTES:
            driver.allow_shared_memory(self._function, compiled.shared_bytes, compiled.name)

    def prepare(
        self,
        tensors: Sequence[int | None],
        scalars: Mapping[str, int],
        scratch: int = 0,
        stream: int = 0,
        overlap: bool = False,
    ) -> CudaLaunch:
        """Fix one launch.

        Args:
            tensors: device addresses of the launch's tensor arguments followed by its outputs, None for absent ones.
            scalars: step scalars by name; they also decide the grid.
            scratch: device address of the kernel's scratch memory.
            stream: a ``CUstream``, 0 for the default one.
            overlap: the kernel may start before the one in front of it on the stream has finished (programmatic
                dependent launch). Only for a kernel that waits for it itself, and compute capability 9.0 or later.

        Raises:
            DeviceError: an argument is missing or misplaced, or the grid is larger than CUDA allows.
        """
        arguments = ArgumentBuffer(self._compiled.name, self._kernel.arguments, self._parameters)
        arguments.fill(tensors, scratch, scalars)
        grid = grid_size(self._kernel.grid, scalars)
        if any(not 0 <= size <= limit for size, limit in zip(grid, _GRID_LIMITS, strict=True)):
            raise DeviceError(f"{self._compiled.name}: grid {grid} from {dict(scalars)} is not within {_GRID_LIMITS}")
        config = LaunchConfig(*grid, _WARP * self._compiled.num_warps, 1, 1, self._compiled.shared_bytes, stream)
        if overlap:
            attribute = LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION)
            attribute.value[0] = 1
            config.attributes, config.num_attributes = ctypes.pointer(attribute), 1
        return CudaLaunch(self._driver, self._compiled.name, self._function, config, arguments)

    def close(self) -> None:
        """Unload the kernel; its launches must not be made any more."""
        self._driver.unload_module(self._module)
