"""Generated rope and KV-write kernels against their references."""

from __future__ import annotations

import torch
from cpu_kernel_cases import Case
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def make_cache(blocks: int, heads: int, block_size: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """K and V views into one pool: each block holds K, then V, then bytes of nobody."""
    k_size, v_size = heads * block_size * k_dim, heads * block_size * v_dim
    pool = torch.randn(blocks, k_size + v_size + 24).to(dtype)
    k = pool[:, :k_size].unflatten(1, (heads, block_size, k_dim))
    return [k, pool[:, k_size : k_size + v_size].unflatten(1, (heads, block_size, v_dim))]


def _write_cases(dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(2)
    cases = []
    for style, rotary, q_heads, kv_heads, dim, v_dim, normed in (
        ("half", 64, 12, 6, 64, 64, False),
        ("half", 10, 3, 1, 20, 12, True),
        ("interleaved", 24, 4, 2, 40, 40, True),
        ("interleaved_to_half", 16, 2, 2, 16, 24, False),
        ("half", 0, 2, 1, 8, 8, False),
    ):
        tokens = 9
        merged = torch.randn(tokens, (q_heads + kv_heads) * dim + kv_heads * v_dim).to(dtype)
        q = merged[:, : q_heads * dim].unflatten(1, (q_heads, dim))
        k = merged[:, q_heads * dim : (q_heads + kv_heads) * dim].unflatten(1, (kv_heads, dim))
        v = merged[:, (q_heads + kv_heads) * dim :].unflatten(1, (kv_heads, v_dim))
        cos, sin = (torch.rand(2, 50, rotary) * 2 - 1).to(dtype) if rotary else (None, None)
        norms = [torch.rand(dim).to(dtype) + 0.5 for _ in range(2)] if normed else [None, None]
        slots = torch.tensor([4, 5, 6, 7, 30, 31, 13, 0, 0])  # the last two are padding in the null block
        positions = torch.tensor([0, 1, 2, 3, 48, 49, 7, 0, 0])
        cache = make_cache(8, kv_heads, 4, dim, v_dim, dtype)
        dynamic = {(i, 0): "T" for i in (0, 1, 2, 5, 10, "out")}
        scalars = {"T": tokens}
        attrs = {"eps": 1e-6, "offset": 0.0, "weight_fp32": False, "style": style}
        args = [q, k, v, cos, sin, positions, *norms, *cache, slots]
        name = f"{style}-{rotary}-{dim} {dtype}"
        cases.append(Case(name, "rope_kv_write", attrs, args, dynamic, scalars, mutated=(8, 9)))
        dynamic = {(0, 0): "T", (1, 0): "T", (4, 0): "T"}
        cases.append(Case(f"plain {name}", "kv_write", {}, [k, v, *cache, slots], dynamic, scalars, mutated=(2, 3)))
    return cases


def test_kv_write_kernels_equal_their_references_and_touch_only_their_slots(check_cases) -> None:
    cases = [case for dtype in DTYPES for case in _write_cases(dtype)]
    for case in cases:  # two tokens in one padding slot leave an unspecified value there: make them equal
        for index in (0, 1, 2) if case.op == "rope_kv_write" else (0, 1):
            case.args[index][-1] = case.args[index][-2]
    check_cases(cases, core=("half-10", "plain half-64"))


def test_rope_kernels_equal_the_reference_in_both_layouts(check_cases) -> None:
    cases = []
    for dtype in DTYPES:
        for style, rotary, dim in (("half", 64, 64), ("half", 12, 30), ("interleaved", 30, 30)):
            rows = torch.randn(1, 7, 3, dim).to(dtype)
            cos, sin = torch.rand(2, 1, 7, rotary).to(dtype)
            name = f"{style}-{rotary}-{dim} {dtype}"
            attrs = {"style": style, "heads_first": False}
            dynamic = {(0, 1): "T", (1, 1): "T", (2, 1): "T", ("out", 1): "T"}
            cases.append(Case(f"tokens first {name}", "rope", attrs, [rows, cos, sin], dynamic, {"T": 7}))
            heads = rows.transpose(1, 2)
            attrs = {"style": style, "heads_first": True}
            dynamic = {(0, 2): "T", (1, 1): "T", (2, 1): "T", ("out", 2): "T"}
            case = Case(f"heads first {name}", "rope", attrs, [heads, cos, sin], dynamic, {"T": 7}, contiguous=("out",))
            cases.append(case)
    check_cases(cases, core=("heads first half-12",))
