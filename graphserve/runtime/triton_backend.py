"""Generated Triton kernels behind a plan: compiled for the device at hand, launched through its driver."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphserve.errors import DeviceError
from graphserve.kernels.triton.compiled import CompiledKernel
from graphserve.kernels.triton.grid import evaluate
from graphserve.kernels.triton.kernel import TARGETS, TritonKernel
from graphserve.kernels.triton.overlap import MAX_OVERLAP_TOKENS
from graphserve.plan.runner import Action, PlanRunner, StepSize
from graphserve.plan.schema import Launch
from graphserve.runtime.choices import MeasuredChoices
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.cuda_launcher import CudaLaunch, CudaLauncher
from graphserve.runtime.launch_specs import op_name, tensor_names, value_name
from graphserve.runtime.library_calls import bind_product
from graphserve.runtime.triton_plan import TritonPlan, decode_segments


def target_of(capability: tuple[int, int]) -> str:
    """The compile target for a CUDA compute capability.

    Raises:
        DeviceError: the device is older than the oldest target.
    """
    known = sorted((int(t.split(":")[1]) for t in TARGETS if t.startswith("cuda:")), reverse=True)
    have = capability[0] * 10 + capability[1]
    for number in known:
        # A binary runs on its own major version only, so 90 serves 9.x and 100 serves 10.x.
        if have // 10 == number // 10:
            return f"cuda:{number}"
    raise DeviceError(
        f"compute capability {capability[0]}.{capability[1]} is not served: kernels exist for "
        f"{', '.join(f'{n // 10}.x' for n in sorted(known))}"
    )


class TritonBackend:
    """Binds ``triton`` and ``library`` launches on a CUDA device.

    Args:
        plan: from :func:`graphserve.runtime.triton_plan.lower_to_triton`.
        compiled: binaries of the plan's kernels by key. A launch with a kernel that is not among them is left to its
            reference.
        driver: with the device's context current on this thread.
        device: where the runner's tensors live.
        stream: the ``CUstream`` that launches go to, 0 for the default one.

    Attributes:
        table_lens: row length of each cache group's block table.
        choices: how decode steps that are bound from now on run.

    Invariant: launches hold addresses only; the runner keeps its tensors alive and in place while they may run.
    """

    def __init__(
        self,
        plan: TritonPlan,
        compiled: Mapping[str, CompiledKernel],
        driver: CudaDriver,
        device: torch.device,
        stream: int = 0,
    ) -> None:
        self._plan = plan
        self._kernels = {kernels[0].symbol: kernels for kernels in plan.kernels.values()}
        self._decode_kernels = {
            plan.kernels[index][0].symbol: choices for index, choices in plan.decode_kernels.items()
        }
        self._driver = driver
        self._launchers: dict[str, CudaLauncher] = {}
        self.load(compiled)
        self._device = device
        self._stream = stream
        # Two areas: kernels that need zeros leave zeros behind, the others leave anything.
        self._scratch = {zeroed: torch.zeros(0, dtype=torch.uint8, device=device) for zeroed in (True, False)}
        self._outgrown: list[torch.Tensor] = []  # launches bound before still point there
        self.table_lens: list[int] = []
        self.choices = MeasuredChoices()

    def load(self, compiled: Mapping[str, CompiledKernel]) -> None:
        """Load those of the plan's kernels that were not compiled before. Launches must then be bound anew."""
        for key, kernel in self._plan.distinct_kernels().items():
            if key in compiled and key not in self._launchers:
                self._launchers[key] = CudaLauncher(self._driver, kernel, compiled[key])

    def has_kernel(self, key: str) -> bool:
        """Whether a kernel is loaded."""
        return key in self._launchers

    def bind(
        self, launch: Launch, runner: PlanRunner, tensors: Mapping[str, torch.Tensor], size: StepSize
    ) -> Action | None:
        if op_name(launch) == "linear":
            x = tensors[value_name(launch.args[0])]
            if self._plan.is_library_product(launch, x.numel() // x.shape[-1], self.choices.of(size)):
                return bind_product(launch, tensors)
        kernels = self._kernels_of(launch, tensors, size)
        if any(kernel.key not in self._launchers for kernel in kernels):
            return None
        scalars = self._scalars(size)
        overlaps = self._plan.overlap and size.num_tokens <= MAX_OVERLAP_TOKENS
        pointers = [tensors[name].data_ptr() if name else None for name in tensor_names(launch)]
        launches = [
            self._launchers[kernel.key].prepare(
                pointers, scalars, self._scratch_address(kernel, scalars), self._stream, overlaps
            )
            for kernel in kernels
        ]
        return launches[0] if len(launches) == 1 else SeveralLaunches(launches)

    def _kernels_of(self, launch: Launch, tensors: Mapping[str, torch.Tensor], size: StepSize) -> list[TritonKernel]:
        assert launch.kernel is not None
        by_segments = self._decode_kernels.get(launch.kernel)
        if by_segments is None or size.num_tokens != size.num_seqs:
            return self._kernels[launch.kernel]
        key_heads = tensors[value_name(launch.args[1])].shape[1]
        return by_segments[self.choices.of(size).segments or decode_segments(size.num_tokens * key_heads)]

    def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
        flat: list[Action] = []
        for action in actions:
            flat.extend(action.launches if isinstance(action, SeveralLaunches) else [action])
        return flat

    def close(self) -> None:
        """Unload all kernels; bound launches must not be made any more."""
        for launcher in self._launchers.values():
            launcher.close()
        self._launchers.clear()
        self._scratch.clear()
        self._outgrown.clear()

    def _scalars(self, size: StepSize) -> dict[str, int]:
        tokens, rows, seqs = size
        return {"T": tokens, "R": rows, "S": seqs, **{f"B_{g}": n for g, n in enumerate(self.table_lens)}}

    def _scratch_address(self, kernel: TritonKernel, scalars: Mapping[str, int]) -> int:
        num_bytes = evaluate(kernel.scratch, scalars)
        if num_bytes == 0:
            return 0
        area = self._scratch[kernel.scratch_zeroed]
        if area.numel() < num_bytes:
            self._outgrown.append(area)
            area = self._scratch[kernel.scratch_zeroed] = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        return area.data_ptr()


class SeveralLaunches:
    """The launches of one plan launch, in order."""

    def __init__(self, launches: list[CudaLaunch]) -> None:
        self.launches = launches

    def __call__(self) -> None:
        for launch in self.launches:
            launch()
