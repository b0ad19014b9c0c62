"""The part of the CUDA driver API that kernels and memory at fixed addresses need, called through ctypes.

No torch extension and no compiler: only the ``libcuda`` that comes with the GPU's driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, Structure, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ushort, c_void_p
from typing import Any

from graphserve.errors import DeviceError

LIBRARY = "libcuda.so.1"
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class LaunchAttribute(Structure):
    """``CUlaunchAttribute``: 72 bytes, the value is a union of 64 of which we use one int."""

    _fields_ = [("id", c_int), ("padding", c_int), ("value", c_int * 16)]


class LaunchConfig(Structure):
    """``CUlaunchConfig``."""

    _fields_ = [
        ("grid_x", c_uint), ("grid_y", c_uint), ("grid_z", c_uint),
        ("block_x", c_uint), ("block_y", c_uint), ("block_z", c_uint),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(LaunchAttribute)),
        ("num_attributes", c_uint),
    ]  # fmt: skip


class MemoryLocation(Structure):
    """``CUmemLocation``."""

    DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE

    _fields_ = [("type", c_int), ("id", c_int)]


class MemoryProperties(Structure):
    """``CUmemAllocationProp``."""

    PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED

    _fields_ = [
        ("type", c_int), ("requested_handle_types", c_int), ("location", MemoryLocation),
        ("win32_metadata", c_void_p),
        ("compression_type", c_ubyte), ("gpu_direct_rdma_capable", c_ubyte), ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    ]  # fmt: skip


class MemoryAccess(Structure):
    """``CUmemAccessDesc``."""

    READ_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    _fields_ = [("location", MemoryLocation), ("flags", c_int)]


# Function → argument types; each returns a CUresult.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(MemoryProperties), c_int),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemCreate": (POINTER(c_uint64), c_size_t, POINTER(MemoryProperties), c_uint64),
    "cuMemRelease": (c_uint64,),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(MemoryAccess), c_size_t),
    "cuLaunchKernelEx": (POINTER(LaunchConfig), c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
}


class CudaDriver:
    """Typed entry points of one ``libcuda``.

    Args:
        library: an object that has the driver's functions as attributes; the system's driver library by default.
        more: further functions and their argument types, for :meth:`call`.

    Raises:
        DeviceError: there is no driver library, or it lacks a function (``cuLaunchKernelEx`` came with CUDA 11.8).
    """

    def __init__(self, library: Any = None, more: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise DeviceError(f"cannot load {LIBRARY}: install the GPU's driver ({error})") from error
        self._functions: dict[str, Any] = {}
        for name, types in (_FUNCTIONS | dict(more or {})).items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise DeviceError(f"the CUDA driver has no {name}: update it to that of CUDA 12 or later") from error
            function.argtypes, function.restype = types, c_int
            self._functions[name] = function
        self.launch_kernel = self._functions["cuLaunchKernelEx"]
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any, what: str = "") -> None:
        """Call a driver function.

        Args:
            function: its name.
            arguments: as its C declaration has them.
            what: the kernel or device it is called for, named in an error.

        Raises:
            DeviceError: it did not return ``CUDA_SUCCESS``.
        """
        self.check(self._functions[function](*arguments), function, what)

    def check(self, result: int, function: str, what: str = "") -> None:
        """Raise a DeviceError unless ``result`` is ``CUDA_SUCCESS``."""
        if result == 0:
            return
        name = self._describe("cuGetErrorName", result) or "unknown error"
        text = self._describe("cuGetErrorString", result)
        place = f" for {what}" if what else ""
        raise DeviceError(f"{function} failed{place}: {name} ({result}){': ' + text if text else ''}")

    def use_device(self, index: int) -> None:
        """Make the primary context of a device current on this thread; it is the one torch uses.

        Every thread that loads or launches kernels calls this once, unless torch did so for it.
        """
        device, context = c_int(), c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), index, what=f"device {index}")
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device, what=f"device {index}")
        self.call("cuCtxSetCurrent", context, what=f"device {index}")

    def load_module(self, image: bytes, what: str) -> int:
        """Load a cubin into the current context; returns the module's handle."""
        module = c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), image, what=what)
        assert module.value is not None
        return module.value

    def unload_module(self, module: int) -> None:
        """Free a module; its functions must no longer be launched."""
        self.call("cuModuleUnload", module)

    def get_function(self, module: int, name: str) -> int:
        """Handle of a kernel in a loaded module."""
        function = c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode(), what=name)
        assert function.value is not None
        return function.value

    def allow_shared_memory(self, function: int, num_bytes: int, name: str) -> None:
        """Let a kernel be launched with ``num_bytes`` of dynamic shared memory, more than the default limit."""
        what = f"{name} with {num_bytes} bytes of dynamic shared memory"
        self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, num_bytes, what=what)

    def _describe(self, function: str, result: int) -> str:
        text = c_char_p()
        found = self._functions[function](result, ctypes.byref(text)) == 0
        return text.value.decode() if found and text.value else ""
