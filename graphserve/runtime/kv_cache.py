"""The paged KV cache of one device: one pool of equal blocks, and each cache layer's view of it."""

from __future__ import annotations

import torch

from graphserve.plan.runner import torch_dtype
from graphserve.plan.schema import Plan


class KVCache:
    """Pool tensors and the views that layers read and write.

    The i-th layer of every cache group lives in pool tensor i: a block belongs to one group at a time, so the same
    bytes serve whichever group holds the block. Within a block a layer keeps its keys, then its values, each
    ``[kv_heads, block_size, dim]``.

    Args:
        plan: its cache layers and groups.
        num_blocks: blocks of the pool, the null block 0 included.
        block_size: tokens a block.

    Attributes:
        layers: per cache layer ``(kv_k [num_blocks, kv_heads, block_size, k_dim], kv_v [..., v_dim])``. A layer that
            shares another's cache has the same tensors.
        num_bytes: bytes of all pool tensors.
    """

    def __init__(self, plan: Plan, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        specs = plan.cache_layers
        num_tensors = max((len(g.layers) for g in plan.cache_groups), default=0)
        pools: list[torch.Tensor] = []
        for i in range(num_tensors):
            sharing = [specs[g.layers[i]] for g in plan.cache_groups if i < len(g.layers)]
            # A block must hold whichever layer needs most; 64 bytes keep every block aligned for vector loads.
            block_bytes = -(-max(s.bytes_per_token for s in sharing) * block_size // 64) * 64
            pools.append(torch.zeros(num_blocks, block_bytes, dtype=torch.uint8, device=device))
        self.num_bytes = sum(p.numel() for p in pools)
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        pool_of = {layer: pools[i] for g in plan.cache_groups for i, layer in enumerate(g.layers)}
        for index, spec in enumerate(specs):
            if spec.shared_with is not None:
                self.layers.append(self.layers[spec.shared_with])
                continue
            pool = pool_of[index].view(torch_dtype(spec.dtype))
            k_size = spec.kv_heads * block_size * spec.k_dim
            shape = (num_blocks, spec.kv_heads, block_size)
            strides = (pool.stride(0), block_size * spec.k_dim, spec.k_dim, 1)
            keys = pool.as_strided((*shape, spec.k_dim), strides)
            strides = (pool.stride(0), block_size * spec.v_dim, spec.v_dim, 1)
            values = pool.as_strided((*shape, spec.v_dim), strides, pool.storage_offset() + k_size)
            self.layers.append((keys, values))
