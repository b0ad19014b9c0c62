"""The generated experts kernel against the reference: layouts, gates, sentinels, uneven routing."""

from __future__ import annotations

import torch
from cpu_kernel_cases import Case

DTYPES = (torch.float32, torch.bfloat16)


def moe_case(
    name: str,
    dtype: torch.dtype,
    rows: int,
    *,
    experts: int = 5,
    top_k: int = 2,
    hidden: int = 48,
    inner: int = 40,
    biased: bool = False,
    router_dtype: torch.dtype | None = None,
    ids: torch.Tensor | None = None,
    **attrs: object,
) -> Case:
    """Random experts in the layout the attributes name."""
    torch.manual_seed(rows + hidden)
    attrs = {"act": "silu", "transposed": False, "interleaved": False, "limit": 0.0, "alpha": 0.0} | attrs
    width = 2 * inner if attrs.get("has_gate", True) else inner
    gate_up = (torch.randn(experts, width, hidden) * hidden**-0.5).to(dtype)
    down = (torch.randn(experts, hidden, inner) * inner**-0.5).to(dtype)
    biases = [torch.randn(experts, width).to(dtype), torch.randn(experts, hidden).to(dtype)] if biased else [None, None]
    if attrs["transposed"]:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    if ids is None:
        ids = torch.tensor(torch.rand(rows, experts).argsort(dim=1)[:, :top_k].tolist())
    weights = torch.rand(ids.shape).to(router_dtype or dtype)
    x = torch.randn(rows, hidden).to(dtype)
    args = [x, ids, weights, gate_up, biases[0], down, biases[1]]
    dynamic = {(0, 0): "T", (1, 0): "T", (2, 0): "T", ("out", 0): "T"}
    return Case(f"{name} {dtype}", "moe", attrs, args, dynamic, {"T": rows}, rounding=4.0)


def _cases(dtype: torch.dtype) -> list[Case]:
    clamped = {"act": "swiglu_clamp", "limit": 1.5, "alpha": 1.702, "interleaved": True, "transposed": True}
    sentinels = torch.tensor([[0, 5], [5, 5], [4, -1]])
    return [
        moe_case("one row", dtype, 1),
        moe_case("many rows", dtype, 37, router_dtype=torch.float32),
        moe_case("all rows to one expert", dtype, 9, ids=torch.full((9, 1), 3)),
        moe_case("sentinels", dtype, 3, ids=sentinels),
        moe_case("gpt-oss", dtype, 6, biased=True, **clamped),
        moe_case("transposed", dtype, 6, transposed=True, hidden=33, inner=17),
        moe_case("clamped silu", dtype, 6, limit=0.5),
        moe_case("no gate", dtype, 6, has_gate=False, act="relu2", biased=True),
        moe_case("weights on input", dtype, 6, weights_on_input=True, top_k=1),
        moe_case("wide", dtype, 11, experts=3, hidden=256, inner=160, act="gelu_tanh"),
    ]


def test_expert_kernels_equal_the_reference_in_every_layout(check_cases) -> None:
    check_cases([case for dtype in DTYPES for case in _cases(dtype)], core=("many rows", "gpt-oss"))
