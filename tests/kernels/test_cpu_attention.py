"""The generated attention kernel against the reference: every rule, ragged batches, padding, split keys."""

from __future__ import annotations

import torch
from cpu_kernel_cases import Case

from graphserve.kernels.attention import attend

DTYPES = (torch.float32, torch.bfloat16)


def attention_case(
    name: str,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    k_dim: int = 64,
    v_dim: int = 64,
    block_size: int = 16,
    padding: int = 0,
    sinks: bool = False,
    alibi: bool = False,
    **rule: float,
) -> Case:
    """A batch of (query length, context length) sequences whose blocks lie scattered over the pool."""
    torch.manual_seed(len(name))
    tokens = sum(query for query, _ in lengths) + padding
    needed = [-(-context // block_size) for _, context in lengths]
    width = max(needed) + 1
    order = (torch.randperm(sum(needed)) + 1).int()
    table = torch.zeros(len(lengths), width, dtype=torch.int32)
    for s, count in enumerate(needed):
        table[s, :count], order = order[:count], order[count:]
    k_size, v_size = kv_heads * block_size * k_dim, kv_heads * block_size * v_dim
    pool = torch.randn(sum(needed) + 1, k_size + v_size).to(dtype)
    kv_k = pool[:, :k_size].unflatten(1, (kv_heads, block_size, k_dim))
    kv_v = pool[:, k_size:].unflatten(1, (kv_heads, block_size, v_dim))
    starts = torch.tensor([0, *(query for query, _ in lengths)]).cumsum(0).int()
    seq_lens = torch.tensor([context for _, context in lengths]).int()
    q = torch.randn(tokens, heads, k_dim).to(dtype)
    attrs = {"scale": k_dim**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "causal": True} | rule
    sink_logits = torch.randn(heads) if sinks else None
    slopes = 2.0 ** -torch.arange(1, heads + 1) if alibi else None
    args = [q, kv_k, kv_v, table, starts, seq_lens, sink_logits, slopes]
    dynamic = {(0, 0): "T", ("out", 0): "T", (3, 0): "S", (3, 1): "B_0", (4, 0): "S+1", (5, 0): "S"}
    sizes = {"T": tokens, "S": len(lengths), "B_0": width}
    # the block table's row length is only known at run time
    return Case(f"{name} {dtype}", "paged_attention", attrs, args, dynamic, sizes, contiguous=(3,))


MIXED = [(1, 1), (1, 37), (5, 5), (17, 40), (0, 0), (1, 130), (64, 64)]


def _mixed_cases(dtype: torch.dtype) -> list[Case]:
    return [
        attention_case("plain", dtype, MIXED, padding=3),
        attention_case("small heads", dtype, MIXED, heads=8, kv_heads=4, k_dim=8, v_dim=8, block_size=5),
        attention_case("every rule", dtype, MIXED, softcap=5.0, sinks=True, alibi=True, window=9, chunk=24),
    ]


def _rule_cases(dtype: torch.dtype) -> list[Case]:
    return [
        attention_case("one group", dtype, MIXED, heads=6, kv_heads=1, k_dim=40, v_dim=24, block_size=4),
        attention_case("window", dtype, MIXED, window=8),
        attention_case("chunk", dtype, MIXED, chunk=16),
        attention_case("both ways", dtype, MIXED, causal=False),
        attention_case("both ways in a window", dtype, MIXED, causal=False, window=7),
        attention_case("split keys", dtype, [(1, 3000)], heads=3, kv_heads=1, k_dim=128, v_dim=128),
        attention_case("split keys with sinks", dtype, [(2, 2100)], heads=2, kv_heads=1, sinks=True),
        attention_case("many heads a group", dtype, [(3, 50)], heads=40, kv_heads=1, k_dim=192, v_dim=128),
    ]


def test_attention_kernels_equal_the_reference_under_every_rule(check_cases) -> None:
    cases = [case for dtype in DTYPES for case in _mixed_cases(dtype) + _rule_cases(dtype)]
    check_cases(cases, core=("plain", "every rule"))


def test_a_query_that_sees_no_key_gets_zeros() -> None:
    q, kv = torch.ones(1, 1, 4), torch.ones(1, 1, 4)
    out = attend(q, kv, kv, torch.tensor([-1]), None, None, 1.0, 0, 0, 0.0, True)
    assert out.abs().max() == 0
