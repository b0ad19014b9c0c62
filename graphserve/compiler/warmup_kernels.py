"""Which kernels a start will need on a target, from the plan and the engine's options alone."""

from __future__ import annotations

import torch

from graphserve.config import EngineConfig
from graphserve.kernels.cpu import CppKernel
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.kernels.triton.overlap import MEASURED_TARGETS
from graphserve.plan.schema import Plan
from graphserve.runtime.cpp_backend import lower_to_cpp
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.memory_plan import NUM_RESULT_SLOTS, largest_step
from graphserve.runtime.step_plan import VARIANTS, StepLimits, step_plan
from graphserve.runtime.triton_plan import lower_to_triton

_NUM_BLOCKS = 2  # the size of the KV pool is in no kernel


def cpp_kernels(plan: Plan, config: EngineConfig, level: str) -> list[CppKernel]:
    """The distinct C++ kernels of a plan at an ISA level."""
    return lower_to_cpp(plan, _kv_cache(plan, config), level, config.deterministic).distinct_kernels()


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
    _, rows, _ = largest_step(config, plan.model["max_model_len"], on_device=True)
    return StepLimits(config.max_num_seqs, rows, NUM_RESULT_SLOTS)


def _kv_cache(plan: Plan, config: EngineConfig) -> KVCache:
    return KVCache(plan, _NUM_BLOCKS, config.block_size, torch.device("meta"))
