"""What a model will take of the memory, worked out from its plan before anything is loaded.

Pure arithmetic: no torch. The KV pool gets what the weights, the buffers of the largest step and captured graphs leave,
and the longest request is cut to what the pool can hold, unless the user set either.
"""

from __future__ import annotations

import logging

import msgspec

from graphserve.config import EngineConfig
from graphserve.errors import ConfigError
from graphserve.plan.arena import ITEM_SIZE, launch_inputs, layout
from graphserve.plan.schema import CacheGroup, Plan
from graphserve.runtime.buckets import Buckets, CaptureBuckets
from graphserve.runtime.kv_pool_size import (
    KVPoolRequirements,
    default_pool_bytes_on_cpu,
    kv_bytes_per_token,
    max_blocks_in_group,
    plan_num_blocks,
)
from graphserve.runtime.plain_torch import plain_sampler_bytes, plain_torch_bytes
from graphserve.runtime.step_fields import step_bytes
from graphserve.runtime.step_plan import StepLimits

logger = logging.getLogger(__name__)

# Logits rows that prompts may take in a step beyond one a sequence: 128 rows of a 152k vocabulary are 78 MB.
PROMPT_LOGPROBS_ROWS = 128
# Largest temporaries of the sampler, for each logit of a row that is drawn with top-p: the logits and their distances
# in fp32, their exponentials, and sums of 64-bit integers.
SAMPLER_BYTES_PER_LOGIT = 28
# On a GPU, of the kernel that searches for the threshold of top-k and top-p; no other takes as much.
SCRATCH_BYTES_PER_LOGIT = 4
NUM_RESULT_SLOTS = 3  # two steps in flight, and one for steps that are made to be captured
# Kept free on a GPU for captured graphs; what they took is measured when they are captured.
GRAPH_BYTES = 256 << 20


class GroupMemory(msgspec.Struct, frozen=True):
    """KV cache of the layers that share a block table."""

    num_layers: int
    rule: str  # "full", "window 1024" or "chunk 8192"
    bytes_per_request: int  # at max_model_len


class MemoryPlan(msgspec.Struct, frozen=True):
    """All sizes in bytes.

    Attributes:
        budget_bytes: what the engine may take in all; what is free where the user set the KV pool's size.
        weight_bytes: weights as they lie in memory, position tables included.
        workspace_bytes: buffers and inputs of the largest step, and the sampler's temporaries.
        plain_torch_bytes: of a tiered start, until kernels are built; graphs have their place afterwards.
        graph_bytes: kept for captured graphs.
        block_bytes: one block of the KV pool.
        num_blocks: blocks of the pool, null block included.
        max_model_len: longest request that the engine takes.
        groups: what a request of that length takes, by cache group.
    """

    budget_bytes: int
    weight_bytes: int
    workspace_bytes: int
    plain_torch_bytes: int
    graph_bytes: int
    block_bytes: int
    num_blocks: int
    max_model_len: int
    groups: tuple[GroupMemory, ...]

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.workspace_bytes + max(self.plain_torch_bytes, self.graph_bytes) + self.kv_bytes

    def __str__(self) -> str:
        """One line: ``weights 0.99 GB, KV cache 4.29 GB (...), buffers 0.13 GB; 5.41 of 15.20 GB``."""
        parts = [f"weights {_gb(self.weight_bytes)}", f"KV cache {_gb(self.kv_bytes)} ({self.num_blocks} blocks)"]
        parts.append(f"buffers {_gb(self.workspace_bytes)}")
        if self.plain_torch_bytes:
            parts.append(f"plain torch until kernels are built {_gb(self.plain_torch_bytes)}")
        if self.graph_bytes:
            parts.append(f"{'then ' if self.plain_torch_bytes else ''}graphs {_gb(self.graph_bytes)}")
        return f"{', '.join(parts)}; {_gb(self.total_bytes)} of {_gb(self.budget_bytes)}"

    def lines(self) -> list[str]:
        """The plan as a table for the log."""
        lines = [f"memory plan: {self}"]
        for group in self.groups:
            lines.append(
                f"  {group.num_layers} layers, {group.rule}: {group.bytes_per_request / 1e6:,.1f} MB a request of "
                f"{self.max_model_len} tokens"
            )
        left = self.budget_bytes - self.total_bytes
        return [*lines, f"  left: {_gb(left)}"]


def plan_memory(plan: Plan, config: EngineConfig, free_bytes: int, device_bytes: int | None = None) -> MemoryPlan:
    """Divide the memory among weights, buffers and KV pool.

    Args:
        plan: the compiled model.
        config: its limits, and the sizes that the user set.
        free_bytes: memory that can be had now, before the weights are loaded.
        device_bytes: all of a GPU's memory; None on a CPU.

    Raises:
        ConfigError: the share of the GPU's memory is not free, the weights and buffers alone need more than it, or the
            KV pool does not hold one request of the ``max_model_len`` that the user set.
    """
    longest = int(plan.model["max_model_len"])
    buffers = workspace_bytes if device_bytes is None else device_workspace_bytes
    weights, workspace = weight_bytes(plan), buffers(plan, config, longest)
    plain_torch = _plain_torch_bytes(plan, config, longest, device_bytes is not None) if config.start == "tiered" else 0
    graphs = GRAPH_BYTES if device_bytes is not None and not config.enforce_eager else 0
    is_pool_given = config.num_gpu_blocks_override is not None or config.kv_cache_memory_bytes is not None
    budget = free_bytes
    if device_bytes is not None and not is_pool_given:
        budget = _share_of_device(config.gpu_memory_utilization, free_bytes, device_bytes)
    left = budget - weights - workspace - max(plain_torch, graphs)
    if left <= 0 and not is_pool_given:
        raise ConfigError(
            f"the model does not fit: weights {_gb(weights)}, buffers {_gb(workspace)} and graphs {_gb(graphs)} (plain "
            f"torch until kernels are built: {_gb(plain_torch)}) leave "
            f"nothing of {_gb(budget)} for the KV cache. Free memory, take a smaller or quantized model, lower "
            "max_num_batched_tokens and max_num_seqs, or raise gpu_memory_utilization"
        )
    default = default_pool_bytes_on_cpu(left) if device_bytes is None else left
    pool = config.kv_cache_memory_bytes or default
    requirements = _requirements(plan, config, longest)
    if config.max_model_len is None and config.num_gpu_blocks_override is None:
        fitted = fit_max_model_len(requirements, pool)
        if fitted < longest:
            logger.warning(
                "max_model_len is %d instead of the model's %d: so many tokens fit into %.2f GB of KV cache (raise "
                "kv_cache_memory_bytes to have more)", fitted, longest, pool / 1e9,
            )  # fmt: skip
            longest = fitted
            requirements = _requirements(plan, config, longest)
    num_blocks = plan_num_blocks(requirements, pool, config.num_gpu_blocks_override)
    groups = tuple(_group_memory(group, plan, requirements) for group in plan.cache_groups)
    sizes = (weights, workspace, plain_torch, graphs, requirements.block_bytes)
    return MemoryPlan(budget, *sizes, num_blocks, longest, groups)


def _share_of_device(share: float, free_bytes: int, device_bytes: int) -> int:
    """What this engine may take, whatever others have taken: as in vLLM a share of the whole memory, which is free."""
    budget = int(device_bytes * share)
    if budget > free_bytes:
        raise ConfigError(
            f"gpu_memory_utilization={share:g} of {_gb(device_bytes)} is {_gb(budget)}, but only {_gb(free_bytes)} are "
            f"free: stop other programs on this GPU, lower it to {max(0.0, free_bytes / device_bytes - 0.005):.2f}, or "
            "set kv_cache_memory_bytes"
        )
    return budget


def fit_max_model_len(requirements: KVPoolRequirements, pool_bytes: int) -> int:
    """The longest request, in whole blocks, that a pool of this size holds; at most ``requirements.max_model_len``."""
    size, longest = requirements.block_size, requirements.max_model_len
    low, high = 1, -(-longest // size)  # blocks; a request of one block is the least that is tried
    while low < high:
        middle = (low + high + 1) // 2
        tried = msgspec.structs.replace(
            requirements, max_model_len=middle * size, max_chunk=min(requirements.max_chunk, middle * size)
        )
        if (_blocks_per_request(tried) + 1) * requirements.block_bytes <= pool_bytes:
            low = middle
        else:
            high = middle - 1
    return min(longest, low * size)


def weight_bytes(plan: Plan) -> int:
    """Bytes of the weights that launches read; what only load-time launches read is freed."""
    read = {name for launch in plan.launches for name in launch_inputs(launch)}
    return sum(
        _num_bytes(weight.spec.shape, weight.spec.dtype) for name, weight in plan.weights.items() if name in read
    )


def largest_step(config: EngineConfig, max_model_len: int, on_device: bool) -> tuple[int, int, int]:
    """Tokens, logits rows and sequences of the largest step of an engine.

    Args:
        on_device: steps are sampled on the device and captured there.
    """
    most = config.max_num_seqs
    buckets = CaptureBuckets(most, config.cudagraph_capture_sizes) if on_device else Buckets(most)
    if config.enforce_eager:
        buckets = Buckets(most, is_enabled=False)
    return buckets.largest_step(most, config.token_budget(max_model_len), most + PROMPT_LOGPROBS_ROWS)


def workspace_bytes(plan: Plan, config: EngineConfig, max_model_len: int) -> int:
    """Buffers and inputs of the largest step, and the sampler's temporaries."""
    tokens, rows, seqs = largest_step(config, max_model_len, on_device=False)
    num_groups = len(plan.cache_groups)
    table_len = -(-int(plan.model["max_model_len"]) // config.block_size)
    inputs = tokens * 8 * (2 + num_groups) + rows * 8 + seqs * 4 * (2 + num_groups * table_len)
    sampler = config.max_num_seqs * int(plan.model["vocab_size"]) * SAMPLER_BYTES_PER_LOGIT
    return layout(plan, tokens, rows).num_bytes + inputs + sampler


def device_workspace_bytes(plan: Plan, config: EngineConfig, max_model_len: int) -> int:
    """Buffers and inputs of the largest step that samples on the device, and its kernels' scratch memory."""
    tokens, rows, seqs = largest_step(config, max_model_len, on_device=True)
    table_len = -(-int(plan.model["max_model_len"]) // config.block_size)
    limits = StepLimits(config.max_num_seqs, rows, NUM_RESULT_SLOTS)
    scratch = rows * int(plan.model["vocab_size"]) * SCRATCH_BYTES_PER_LOGIT
    return step_bytes(plan, limits, table_len, (tokens, rows, seqs)) + scratch


def _plain_torch_bytes(plan: Plan, config: EngineConfig, max_model_len: int, on_device: bool) -> int:
    tokens, rows, _ = largest_step(config, max_model_len, on_device)
    sampler = plain_sampler_bytes(rows * int(plan.model["vocab_size"])) if on_device else 0
    return max(plain_torch_bytes(plan, tokens, rows, max_model_len), sampler)


def _requirements(plan: Plan, config: EngineConfig, max_model_len: int) -> KVPoolRequirements:
    return KVPoolRequirements(
        groups=plan.cache_groups,
        bytes_per_token=kv_bytes_per_token(plan),
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_chunk=min(max_model_len, config.token_budget(max_model_len)),
    )


def _blocks_per_request(requirements: KVPoolRequirements) -> int:
    return sum(
        max_blocks_in_group(g, requirements.max_model_len, requirements.max_chunk, requirements.block_size)
        for g in requirements.groups
    )


def _group_memory(group: CacheGroup, plan: Plan, requirements: KVPoolRequirements) -> GroupMemory:
    rule = f"window {group.window}" if group.window else f"chunk {group.chunk}" if group.chunk else "full"
    blocks = max_blocks_in_group(group, requirements.max_model_len, requirements.max_chunk, requirements.block_size)
    return GroupMemory(len(group.layers), rule, blocks * requirements.block_bytes)


def _num_bytes(shape: tuple[int | str, ...], dtype: str) -> int:
    count = ITEM_SIZE[dtype]
    for dim in shape:
        count *= int(dim)
    return count


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
