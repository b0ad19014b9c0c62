"""Which kernels a start will need on a target, from the plan and the engine's options alone."""

from __future__ import annotations

import torch

from graphserve.config import EngineConfig
from graphserve.engine.llm_engine import PROMPT_LOGPROBS_ROWS
from graphserve.engine.scheduler import SchedulerLimits
from graphserve.engine.step_builder import StepBuilder
from graphserve.kernels.cpu import CppKernel
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.kernels.triton.overlap import MEASURED_TARGETS
from graphserve.plan.schema import Plan
from graphserve.runtime.buckets import CaptureBuckets
from graphserve.runtime.cpp_backend import lower_to_cpp
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.step_plan import VARIANTS, StepLimits, step_plan
from graphserve.runtime.triton_plan import lower_to_triton

_NUM_BLOCKS = 2  # the size of the KV pool is in no kernel
_STEPS_IN_FLIGHT = 2


def cpp_kernels(plan: Plan, config: EngineConfig, level: str) -> list[CppKernel]:
    """The distinct C++ kernels of a plan at an ISA level."""
    lowered = lower_to_cpp(plan, _kv_cache(plan, config), level, config.deterministic)
    return list({kernel.key: kernel for kernel in lowered.kernels.values()}.values())


def triton_kernels(plan: Plan, config: EngineConfig, target: str) -> list[TritonKernel]:
    """The distinct Triton kernels of a plan and of the steps around it, every variant of them."""
    kv_cache = _kv_cache(plan, config)
    kernels: dict[str, TritonKernel] = {}
    for variant in VARIANTS:
        step = step_plan(plan, variant, _step_limits(plan, config))
        overlap = target in MEASURED_TARGETS
        kernels |= lower_to_triton(step.plan, kv_cache, target, config.deterministic, overlap).distinct_kernels()
    return list(kernels.values())


def _step_limits(plan: Plan, config: EngineConfig) -> StepLimits:
    """The sizes that a device engine with these options fixes for all its steps."""
    num_lanes = config.max_num_seqs
    builder = StepBuilder(len(plan.cache_groups), config.block_size, CaptureBuckets(num_lanes), num_lanes)
    limits = SchedulerLimits(
        max_num_seqs=num_lanes,
        max_num_batched_tokens=config.token_budget(plan.model["max_model_len"]),
        max_logits_rows=num_lanes + PROMPT_LOGPROBS_ROWS,
        enable_chunked_prefill=config.enable_chunked_prefill,
    )
    return StepLimits(num_lanes, builder.largest_step(limits).num_rows, num_slots=_STEPS_IN_FLIGHT + 1)


def _kv_cache(plan: Plan, config: EngineConfig) -> KVCache:
    return KVCache(plan, _NUM_BLOCKS, config.block_size, torch.device("meta"))
