"""Generated kernels on a CUDA device, through the product's own launcher, beside their reference ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from graphserve.kernels.triton.compile import compile_for
from graphserve.kernels.triton.compiled import CompiledKernel
from graphserve.kernels.triton.grid import evaluate
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.cuda_launcher import CudaLaunch, CudaLauncher
from graphserve.runtime.triton_backend import target_of
from tests.triton_kernel_cases import Case

_GUARD = 256  # bytes before and after an output that no kernel may touch; keeps the output aligned
_PATTERN = 0x5A


class Tolerance(NamedTuple):
    """A value may differ by ``relative`` of itself plus ``absolute`` of the mean size of the values.

    The mean is that of expected values other than zero: a cache is mostly zeros, which say nothing of its values.
    """

    relative: float
    absolute: float


# References compute in fp32 from the same 16-bit inputs and round nothing on the way. A kernel rounds to its own dtype
# where eager code does: up to five times (the norm sandwich), each by at most 2**-8 (bf16, half a unit 2**-9) of a
# value that may be some times the mean, and terms may cancel. fp32 kernels multiply in fp32 (no TF32), but sum in
# another order and use the GPU's approximate exp, tanh and rsqrt.
TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-4),
    torch.float16: Tolerance(4e-3, 8e-3),
    torch.bfloat16: Tolerance(2e-2, 6e-2),
}
# Whatever moves a value across the middle between two float8_e4m3fn numbers, however little, rounds it to the next one,
# which is up to 1/8 away (3 bits of mantissa). Below 2**-6 they are 2**-9 apart: less than the absolute part.
E4M3_STEP = 1 / 8


def compare(actual: Tensor, expected: Tensor, tolerance: Tolerance, max_integer_difference: int = 0) -> None:
    """Equal shapes; floats within the tolerance, infinities equal, no NaN; integers within a difference.

    Raises:
        AssertionError: says where and by how much they differ.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    if not expected.dtype.is_floating_point:
        assert not actual.dtype.is_floating_point, f"{actual.dtype} against {expected.dtype}"
        difference = (actual.long() - expected.long()).abs()
        worst = int(difference.max()) if difference.numel() else 0
        assert worst <= max_integer_difference, f"{int((difference > 0).sum())} integers differ, by up to {worst}"
        return
    wide, truth = actual.double(), expected.double()
    sizes = truth[truth.isfinite() & (truth != 0)].abs()
    scale = float(sizes.mean()) if sizes.numel() else 0.0
    relative = tolerance.relative + (E4M3_STEP if expected.dtype == torch.float8_e4m3fn else 0.0)
    torch.testing.assert_close(wide, truth, rtol=relative, atol=tolerance.absolute * scale + 1e-30)


class DeviceKernels:
    """Binds and runs kernels on one device.

    Attributes:
        device: where tensors live.
        target: what kernels are generated and compiled for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.target = target_of(torch.cuda.get_device_capability(device))
        torch.zeros(1, device=device)  # torch makes the device's primary context
        self._driver = CudaDriver()
        self._driver.use_device(device.index or 0)
        self._launchers: dict[str, CudaLauncher] = {}
        self._scratch: list[dict[bool, Tensor]] = []  # bound launches hold addresses only

    def bind(
        self, kernels: Sequence[TritonKernel], tensors: Sequence[Tensor | None], scalars: Mapping[str, int]
    ) -> list[CudaLaunch]:
        """One launch's kernels with their addresses fixed, on torch's current stream.

        Args:
            tensors: the launch's tensor arguments followed by its outputs; the caller keeps them alive.
        """
        num_bytes = max(evaluate(kernel.scratch, scalars) for kernel in kernels)
        # As in the backend, kernels that leave zeros behind have an area of their own. In the other one, what is read
        # before it is written must not look like a number.
        areas = {
            zeroed: torch.full((num_bytes + 16,), 0 if zeroed else 0xFF, dtype=torch.uint8, device=self.device)
            for zeroed in (True, False)
        }
        self._scratch.append(areas)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        stream = torch.cuda.current_stream(self.device).cuda_stream
        return [
            self._launcher(k).prepare(pointers, scalars, areas[k.scratch_zeroed].data_ptr(), stream) for k in kernels
        ]

    def run(self, case: Case) -> list[Tensor]:
        """Results of a case's kernels on the device, the mutated arguments after them; outputs start out as NaN.

        Raises:
            AssertionError: a kernel wrote beside an output, or left scratch memory dirty that it must leave zero.
        """
        kernels = case.kernels(self.target)
        results = case.expected()
        outputs = [_Guarded(like, self.device) for like in results[: len(results) - len(case.mutated)]]
        args = [None if a is None else _moved(a, self.device, a.dtype) for a in case.args]
        for launch in self.bind(kernels, [*args, *(o.tensor for o in outputs)], case.scalars):
            launch()
        torch.cuda.synchronize(self.device)
        for output in outputs:
            output.check()
        areas = self._scratch.pop()
        assert not areas[True].any(), "scratch memory that the next launch needs zeroed is not zero"
        return [o.tensor for o in outputs] + [a for i in case.mutated if (a := args[i]) is not None]

    def expected(self, case: Case) -> list[Tensor]:
        """Results of the reference op on the device, from the same values with 16-bit floats widened to fp32."""
        args = [None if a is None else _moved(a, self.device, _wide(a.dtype)) for a in case.args]
        with self.device:
            return replace(case, args=args).expected()

    def check(self, case: Case, dtype: torch.dtype, max_integer_difference: int = 0) -> None:
        """The kernels give the reference's results within the tolerance of the case's float dtype.

        Rows of a mutated argument that the reference leaves alone must keep every value.
        """
        results, truth = self.run(case), self.expected(case)
        for actual, expected in zip(results, truth, strict=True):
            compare(actual, expected, TOLERANCES[dtype], max_integer_difference)
        before = [a.to(self.device).float() for i in case.mutated if (a := case.args[i]) is not None]
        first = len(results) - len(before)
        for actual, expected, old in zip(results[first:], truth[first:], before, strict=True):
            untouched = (expected.float() == old).all(-1)
            assert torch.equal(actual.float()[untouched], old[untouched]), "changed rows that the reference leaves"

    def adopt(self, kernel: TritonKernel, compiled: CompiledKernel) -> None:
        """Take a kernel that was compiled elsewhere."""
        if kernel.key not in self._launchers:
            self._launchers[kernel.key] = CudaLauncher(self._driver, kernel, compiled)

    def _launcher(self, kernel: TritonKernel) -> CudaLauncher:
        if kernel.key not in self._launchers:
            self._launchers[kernel.key] = CudaLauncher(self._driver, kernel, compile_for(kernel, self.target))
        return self._launchers[kernel.key]


class _Guarded:
    """An output between two zones of a known bit pattern."""

    def __init__(self, like: Tensor, device: torch.device) -> None:
        extent = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True)) + 1
        size = like.element_size()
        self._memory = torch.full((extent * size + 2 * _GUARD,), _PATTERN, dtype=torch.uint8, device=device)
        self._end = _GUARD + extent * size
        values = self._memory[_GUARD : self._end].view(like.dtype)
        self.tensor = values.as_strided(like.shape, like.stride(), values.storage_offset())
        if like.dtype.is_floating_point:
            self.tensor.copy_(torch.full(like.shape, float("nan"), device=device))

    def check(self) -> None:
        zones = torch.cat([self._memory[:_GUARD], self._memory[self._end :]])
        assert bool((zones == _PATTERN).all()), "wrote beside an output"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy on the device with the tensor's own strides.

    Its storage is copied as a whole: an expanded tensor has several elements in one place, which nothing can copy to.
    """
    storage = tensor.untyped_storage()
    elements = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),))
    copied = elements.to(device).to(dtype, copy=True)
    return copied.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
