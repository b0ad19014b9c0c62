"""Generated kernels for the plans of a step's variants, loaded once for all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from graphserve.artifacts import ArtifactStore
from graphserve.kernels.triton.compile_jobs import compile_in_processes, default_jobs
from graphserve.kernels.triton.compiled import (
    CompiledKernel,
    decode_compiled,
    find_compiled,
    find_or_compile_kernels,
)
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.kernels.triton.overlap import MEASURED_TARGETS
from graphserve.plan.runner import Binder
from graphserve.plan.schema import Plan
from graphserve.progress import phase
from graphserve.runtime.background_build import BackgroundBuild
from graphserve.runtime.choices import MeasuredChoices
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.triton_backend import TritonBackend, target_of
from graphserve.runtime.triton_plan import TritonPlan, lower_to_triton

logger = logging.getLogger(__name__)


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
        is_tiered: kernels that are not stored are compiled in the background, while their launches run as plain torch.

    Attributes:
        is_complete: every launch has its kernel.
    """

    def __init__(
        self,
        device: torch.device,
        stream: torch.cuda.Stream,
        store: ArtifactStore,
        deterministic: bool = False,
        overlap: bool | None = None,
        choices: MeasuredChoices | None = None,
        is_tiered: bool = False,
    ) -> None:
        self.is_complete = True
        self._device = device
        self._stream = stream
        self._store = store
        self._deterministic = deterministic
        self._overlap = overlap
        self._choices = choices or MeasuredChoices()
        self._is_tiered = is_tiered
        self._backend: TritonBackend | None = None
        self._kernels: dict[str, TritonKernel] = {}
        self._background: BackgroundBuild[None] | None = None

    def lower(self, plans: Sequence[Plan], kv_cache: KVCache, table_len: int) -> list[tuple[Plan, dict[str, Binder]]]:
        overlap = self._target in MEASURED_TARGETS if self._overlap is None else self._overlap
        lowered, together = lower_variants(plans, kv_cache, self._target, self._deterministic, overlap)
        self._kernels = together.distinct_kernels()
        # What a store that cannot be written would take from the background is lost.
        may_build = self._store.is_writable and not self._store.is_strict
        compiled = self._begin_tiered() if self._is_tiered and may_build else self._compile()
        driver = CudaDriver()
        driver.use_device(self._device.index or 0)
        backend = TritonBackend(together, compiled, driver, self._device, self._stream.cuda_stream)
        self._backend = backend
        backend.table_lens = [table_len] * len(together.plan.cache_groups)
        backend.choices = self._choices
        return [(plan.plan, {"triton": backend, "library": backend}) for plan in lowered]

    @property
    def _target(self) -> str:
        return target_of(torch.cuda.get_device_capability(self._device))

    def _compile(self) -> dict[str, CompiledKernel]:
        with phase("compile Triton kernels", total=len(self._kernels), unit="kernels") as work:
            return find_or_compile_kernels(self._kernels, self._target, self._store, lambda *_: work.advance())

    def _begin_tiered(self) -> dict[str, CompiledKernel]:
        """The kernels that are stored; the others are compiled from now on."""
        compiled = self._stored(self._kernels)
        missing = [kernel for key, kernel in self._kernels.items() if key not in compiled]
        if missing:
            self.is_complete = False
            build = partial(compile_in_processes, missing, self._target, self._store, default_jobs())
            self._background = BackgroundBuild(build)
            logger.info("%d of %d kernels are compiled in the background", len(missing), len(self._kernels))
        return compiled

    def _stored(self, kernels: Mapping[str, TritonKernel]) -> dict[str, CompiledKernel]:
        found = {key: find_compiled(self._store, kernel, self._target) for key, kernel in kernels.items()}
        return {key: decode_compiled(artifact) for key, artifact in found.items() if artifact is not None}

    def complete(self) -> bool:
        if self._background is None or not self._background.is_done:
            return False
        error, self._background = self._background.error, None
        assert self._backend is not None
        missing = {key: kernel for key, kernel in self._kernels.items() if not self._backend.has_kernel(key)}
        compiled = self._stored(missing)
        self._backend.load(compiled)
        self.is_complete = len(compiled) == len(missing)
        if not self.is_complete:
            logger.warning(
                "plain torch goes on running where a kernel is missing (%d of %d), and no step is recorded, which is "
                "slower: %s",
                len(missing) - len(compiled),
                len(self._kernels),
                error or f"{self._store.root} did not keep them",
            )
        elif torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what plain torch took for its results is needed for graphs now
        return bool(compiled)

    def use_choices(self, choices: MeasuredChoices) -> None:
        self._choices = choices
        if self._backend is not None:
            self._backend.choices = choices

    def close(self) -> None:
        if self._background is not None:
            self._background.stop()
            self._background = None
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()
