"""Ragged batches for the attention kernels: blocks scattered over a pool, padding tokens and sequences, any rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton_kernel_cases import Case

from graphserve.kernels.arg_spec import ArgSpec

# What the generator reads besides the op's own attributes.
GENERATOR_ATTRS = ("segments", "max_query_len", "value_is_key_prefix")


@dataclass
class AttentionCase(Case):
    """An attention op; the block table's rows are contiguous and as long as the step says."""

    def expected(self) -> list[Tensor]:
        attrs = {name: value for name, value in self.attrs.items() if name not in GENERATOR_ATTRS}
        return super(AttentionCase, replace(self, attrs=attrs)).expected()

    def _spec(self, tensor: Tensor, index: int | str) -> ArgSpec:
        spec = super()._spec(tensor, index)
        return ArgSpec(spec.dtype, spec.shape) if spec.shape == ("S", "B_0") else spec


def paged_case(
    name: str,
    lengths: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    k_dim: int = 16,
    v_dim: int = 0,
    latent: bool = False,
    block_size: int = 16,
    padding: int = 0,
    sinks: bool = False,
    alibi: bool = False,
    sliced_queries: bool = False,
    rows_dtype: str = "",
    **attrs: Any,
) -> AttentionCase:
    """A batch of (query length, context length) sequences.

    Args:
        name: of the case, and its seed.
        lengths: the sequences; (0, 0) is a padding sequence.
        padding: tokens behind the last sequence.
        latent: the values are the first ``v_dim`` columns of the keys.
        cache_dtype: float8_e4m3fn for a scaled cache.
        out_dtype: float8_e4m3fn or int8 for a quantized result.
        rows_dtype: the same, for a result quantized with one scale a token.
        sliced_queries: q is a column slice of a wider matrix.
        attrs: attributes that differ from a plain causal rule, and the generator's own.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    v_dim = v_dim or k_dim
    tokens = sum(query for query, _ in lengths) + padding
    needed = [-(-context // block_size) for _, context in lengths]
    table = torch.zeros(len(lengths), max([*needed, 1]) + 1, dtype=torch.int32)
    # Entries that no key stands in point outside of the pool: reading through one would fault on a GPU.
    table.fill_(2**30)
    order = (torch.randperm(sum(needed), generator=generator) + 1).int()
    for s, count in enumerate(needed):
        table[s, :count], order = order[:count], order[count:]
    kv_k, kv_v = _pool(randn, sum(needed) + 1, kv_heads, block_size, k_dim, v_dim, latent)
    kv_k[0], kv_v[0] = float("nan"), float("nan")  # the null block is never read
    width = heads * k_dim
    q = randn(tokens, width + 16 * sliced_queries).to(dtype)[:, :width].unflatten(1, (heads, k_dim))
    starts = torch.tensor([0, *(query for query, _ in lengths)]).cumsum(0).int()
    seq_lens = torch.tensor([context for _, context in lengths]).int()
    rule: dict[str, Any] = {"scale": k_dim**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "causal": True}
    stored = cache_dtype or dtype
    args: list[Tensor | None] = [
        q, _cast(kv_k, stored), _cast(kv_v, stored), table, starts, seq_lens,
        randn(heads) if sinks else None,
        2.0 ** -torch.arange(1, heads + 1) if alibi else None,
    ]  # fmt: skip
    if latent:
        assert args[1] is not None
        args[2] = args[1][..., :v_dim]
    op = "paged_attention"
    if cache_dtype or out_dtype:
        op = "paged_attention_quant"
        rule["out_dtype"] = out_dtype or dtype
        args += [torch.tensor([0.7]), torch.tensor([1.3])] if cache_dtype else [None, None]
        args.append(torch.tensor([0.01]) if out_dtype else None)
    if rows_dtype:
        op = "paged_attention_quant_rows"
        rule["dtype"] = rows_dtype
    dynamic = {(0, 0): "T", ("out", 0): "T", (1, 0): "num_blocks", (2, 0): "num_blocks"}
    dynamic |= {(3, 0): "S", (3, 1): "B_0", (4, 0): "S+1", (5, 0): "S"}
    scalars = {"T": tokens, "S": len(lengths), "B_0": table.shape[1]}
    return AttentionCase(name, op, rule | attrs, args, dynamic, scalars)


def packed_case(
    name: str, lengths: list[int], *, heads: int = 4, kv_heads: int = 2, k_dim: int = 16, v_dim: int = 16,
    padding: int = 0, **attrs: Any,
) -> AttentionCase:  # fmt: skip
    """Whole sequences without a cache; q, k and v are column slices of one matrix."""
    torch.manual_seed(sum(map(ord, name)))
    tokens = sum(lengths) + padding
    sizes = [heads * k_dim, kv_heads * k_dim, kv_heads * v_dim]
    q, k, v = torch.randn(tokens, sum(sizes)).split(sizes, dim=1)
    parts = [q.unflatten(1, (heads, k_dim)), k.unflatten(1, (kv_heads, k_dim)), v.unflatten(1, (kv_heads, v_dim))]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    rule = {"scale": k_dim**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "causal": False}
    dynamic = {(0, 0): "T", (1, 0): "T", (2, 0): "T", (3, 0): "S+1", ("out", 0): "T"}
    scalars = {"T": tokens, "S": len(lengths)}
    return AttentionCase(name, "packed_attention", rule | attrs, [*parts, starts, None, None], dynamic, scalars)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype with its own strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype).copy_(tensor)


def _pool(
    randn: Any, num_blocks: int, kv_heads: int, block_size: int, k_dim: int, v_dim: int, latent: bool
) -> tuple[Tensor, Tensor]:
    """Keys and values as views of one pool, so that a block's stride is more than its keys."""
    k_size, v_size = kv_heads * block_size * k_dim, 0 if latent else kv_heads * block_size * v_dim
    pool = randn(num_blocks, k_size + v_size)
    kv_k = pool[:, :k_size].unflatten(1, (kv_heads, block_size, k_dim))
    if latent:
        return kv_k, kv_k[..., :v_dim]
    return kv_k, pool[:, k_size:].unflatten(1, (kv_heads, block_size, v_dim))
