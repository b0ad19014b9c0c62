"""The paged KV cache of one device: one pool of equal blocks, and each cache layer's view of it."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

from graphserve.plan.runner import torch_dtype
from graphserve.plan.schema import Plan
from graphserve.runtime.virtual_memory import arena_on, padded_bytes


class KVCache:
    """Pool tensors and the views that layers read and write.

    The i-th layer of every cache group lives in pool tensor i: a block belongs to one group at a time, so the same
    bytes serve whichever group holds the block. Within a block a layer keeps its keys, then its values, each
    ``[kv_heads, block_size, dim]``. On CUDA the pool lies in virtual memory, which can be unmapped and mapped again.

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
        row_bytes: list[int] = []
        for i in range(num_tensors):
            sharing = [specs[g.layers[i]] for g in plan.cache_groups if i < len(g.layers)]
            # A block must hold whichever layer needs most; 64 bytes keep every block aligned for vector loads.
            row_bytes.append(-(-max(s.bytes_per_token for s in sharing) * block_size // 64) * 64)
        shapes = [(num_blocks, count) for count in row_bytes]
        self._arena = arena_on(device, sum(padded_bytes(math.prod(shape)) for shape in shapes))
        if self._arena is None:
            pools = [_zeros(shape, device) for shape in shapes]
        else:
            self._arena.bytes.zero_()
            pools = [self._arena.allocate(shape, torch.uint8) for shape in shapes]
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

    @property
    def can_unmap(self) -> bool:
        """Whether its memory can leave while its addresses stay."""
        return self._arena is not None

    def unmap(self) -> None:
        """Give the pool's memory back and lose what it holds; until :meth:`map` there may be no step."""
        assert self._arena is not None, "the pool is not in virtual memory"
        self._arena.unmap()

    def map(self) -> None:
        """Take memory again, at the same addresses, filled with zeros.

        Raises:
            DeviceError: the device has not that much free memory.
        """
        assert self._arena is not None, "the pool is not in virtual memory"
        self._arena.map()
        with torch.inference_mode():
            self._arena.bytes.zero_()
        self._arena.synchronize()  # steps may run on another stream


def _zeros(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Zeros, uint8. On the CPU the kernel gives them page by page when they are first touched.

    Writing 4 GiB of zeros took most of a start; pages that no request uses are never made. Large pages are asked for
    as torch does for its own memory (blocks lie scattered).
    """
    num_bytes = math.prod(shape)
    if device.type != "cpu" or num_bytes == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)  # keeps the memory
