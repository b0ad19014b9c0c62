"""Generated kernels for the plans of a step's variants, loaded once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphserve.artifacts import ArtifactStore
from graphserve.kernels.triton.overlap import MEASURED_TARGETS
from graphserve.plan.runner import Binder
from graphserve.plan.schema import Plan
from graphserve.progress import phase
from graphserve.runtime.choices import MeasuredChoices
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.triton_backend import TritonBackend, target_of
from graphserve.runtime.triton_plan import TritonPlan, lower_to_triton


def lower_variants(
    plans: Sequence[Plan], kv_cache: KVCache, target: str, deterministic: bool = False, overlap: bool = False
) -> tuple[list[TritonPlan], TritonPlan]:
    """The GPU form of each plan, and one of all their kernels together."""
    lowered = [lower_to_triton(plan, kv_cache, target, deterministic, overlap) for plan in plans]
    places = [(plan, index) for plan in lowered for index in plan.kernels]
    kernels = {i: plan.kernels[index] for i, (plan, index) in enumerate(places)}
    decode = {i: plan.decode_kernels[index] for i, (plan, index) in enumerate(places) if index in plan.decode_kernels}
    return lowered, TritonPlan(lowered[0].plan, kernels, {}, deterministic, overlap, decode)


class TritonLowering:
    """Lowers a step's plans to Triton kernels and library calls on a CUDA device.

    Args:
        device: where the tensors are.
        stream: that launches go to; a graph is captured on it.
        store: where compiled kernels are kept.
        deterministic: a row's bits must not depend on the other rows of its step.
        overlap: small steps launch kernels while the one in front still runs; by default where this was measured.
        choices: how decode steps run fastest, where that was measured.
    """

    def __init__(
        self,
        device: torch.device,
        stream: torch.cuda.Stream,
        store: ArtifactStore,
        deterministic: bool = False,
        overlap: bool | None = None,
        choices: MeasuredChoices | None = None,
    ) -> None:
        self._device = device
        self._stream = stream
        self._store = store
        self._deterministic = deterministic
        self._overlap = overlap
        self._choices = choices or MeasuredChoices()
        self._backend: TritonBackend | None = None

    def lower(self, plans: Sequence[Plan], kv_cache: KVCache, table_len: int) -> list[tuple[Plan, dict[str, Binder]]]:
        from graphserve.kernels.triton.compiled import find_or_compile_kernels

        target = target_of(torch.cuda.get_device_capability(self._device))
        overlap = target in MEASURED_TARGETS if self._overlap is None else self._overlap
        lowered, together = lower_variants(plans, kv_cache, target, self._deterministic, overlap)
        kernels = together.distinct_kernels()
        with phase("compile Triton kernels", total=len(kernels), unit="kernels") as work:
            compiled = find_or_compile_kernels(kernels, target, self._store, lambda done, total: work.advance())
        driver = CudaDriver()
        driver.use_device(self._device.index or 0)
        backend = TritonBackend(together, compiled, driver, self._device, self._stream.cuda_stream)
        self._backend = backend
        backend.table_lens = [table_len] * len(together.plan.cache_groups)
        backend.choices = self._choices
        return [(plan.plan, {"triton": backend, "library": backend}) for plan in lowered]

    def use_choices(self, choices: MeasuredChoices) -> None:
        self._choices = choices
        if self._backend is not None:
            self._backend.choices = choices

    def close(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()
