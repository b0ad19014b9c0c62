"""How many KV blocks a pool gets: pure arithmetic on bytes and limits."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from graphserve.errors import ConfigError
from graphserve.plan.schema import CacheGroup, Plan

CPU_MAX_BYTES = 4 << 30  # default bound of the pool on a CPU, whose memory serves other programs too
CPU_SHARE_OF_FREE = 0.4  # default share of the memory that is free once the weights are loaded


class KVPoolRequirements(msgspec.Struct, frozen=True):
    """What the pool must serve.

    Attributes:
        groups: cache groups of the plan.
        bytes_per_token: KV bytes of one token place of a block, over all pool tensors.
        block_size: tokens a block.
        max_model_len: longest request in tokens.
        max_num_seqs: most requests that run at a time.
        max_chunk: most new tokens of a request in one step.
    """

    groups: Sequence[CacheGroup]
    bytes_per_token: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_chunk: int

    @property
    def block_bytes(self) -> int:
        return self.bytes_per_token * self.block_size


def kv_bytes_per_token(plan: Plan) -> int:
    """Bytes of one token place of a block.

    The i-th layer of every group lives in pool tensor i, whose places must hold the largest of them.
    """
    num_tensors = max((len(group.layers) for group in plan.cache_groups), default=0)
    total = 0
    for tensor in range(num_tensors):
        layers = [group.layers[tensor] for group in plan.cache_groups if tensor < len(group.layers)]
        total += max(plan.cache_layers[layer].bytes_per_token for layer in layers)
    return total


def max_blocks_in_group(group: CacheGroup, num_tokens: int, num_new_tokens: int, block_size: int) -> int:
    """Most blocks that a request of ``num_tokens``, computed ``num_new_tokens`` a step, holds at a time in a group."""
    needed = -(-num_tokens // block_size)
    reach = min((r for r in (group.window, group.chunk) if r is not None), default=None)
    if reach is not None:
        # The visible past and the new tokens; neither need begin at a block's edge.
        needed = min(needed, -(-(reach + num_new_tokens) // block_size) + 1)
    return needed


def default_pool_bytes_on_cpu(free_bytes: int) -> int:
    """KV memory when the caller names none: 40 % of what is free, at most 4 GiB."""
    return min(CPU_MAX_BYTES, int(free_bytes * CPU_SHARE_OF_FREE))


def plan_num_blocks(requirements: KVPoolRequirements, pool_bytes: int, override: int | None = None) -> int:
    """Number of blocks, null block included.

    Never more than ``max_num_seqs`` requests of full length can use. ``override`` is taken as it is.

    Raises:
        ConfigError: the memory does not hold one request of ``max_model_len``.
    """
    if override is not None:
        return override
    per_request = sum(
        max_blocks_in_group(g, requirements.max_model_len, requirements.max_chunk, requirements.block_size)
        for g in requirements.groups
    )
    most = max(2, per_request * requirements.max_num_seqs + 1)
    if requirements.block_bytes == 0:
        return most
    num_blocks = min(most, pool_bytes // requirements.block_bytes)
    if num_blocks < per_request + 1:
        needed_mib = (per_request + 1) * requirements.block_bytes / 2**20
        raise ConfigError(
            f"one request of max_model_len={requirements.max_model_len} tokens needs {needed_mib:.0f} MiB of KV cache, "
            f"{pool_bytes / 2**20:.0f} MiB are allowed: lower max_model_len or raise kv_cache_memory_bytes"
        )
    return num_blocks
