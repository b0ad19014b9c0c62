"""Generated norm kernels against their references."""

from __future__ import annotations

import torch
from cpu_kernel_cases import Case

DTYPES = (torch.float32, torch.bfloat16)


def _norm_cases(dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(0)
    cases = []
    for rows, dim, weight_fp32, offset in ((1, 768, False, 0.0), (7, 33, True, 1.0), (70, 512, False, 0.0)):
        x, residual = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype)
        weight = (torch.rand(dim) + 0.5).to(dtype)
        name = f"{dtype}-{rows}x{dim}"
        rows_by_symbol = {(0, 0): "T", (1, 0): "T", ("out", 0): "T"}
        attrs = {"eps": 1e-5, "offset": offset, "weight_fp32": weight_fp32}
        one_input = {(0, 0): "T", ("out", 0): "T"}
        cases.append(Case(f"rms {name}", "rms_norm", attrs, [x, weight], one_input, {"T": rows}))
        cases.append(Case(f"add {name}", "add_rms_norm", attrs, [x, residual, weight], rows_by_symbol, {"T": rows}))
        post = (torch.rand(dim) + 0.5).to(dtype)
        after = {(0, 0): "T", (2, 0): "T", ("out", 0): "T"}
        cases.append(Case(f"post {name}", "norm_add", attrs, [x, post, residual], after, {"T": rows}))
        both = {**attrs, "post_eps": 1e-3}
        sandwich = [x, post, residual, weight]
        cases.append(Case(f"sandwich {name}", "norm_add_rms_norm", both, sandwich, after, {"T": rows}))
    bias = torch.randn(33).to(dtype)
    x, residual = torch.randn(5, 33).to(dtype) + 3, torch.randn(5, 33).to(dtype)
    weight = torch.rand(33).to(dtype)
    sizes = {(0, 0): "T", (1, 0): "T", ("out", 0): "T"}
    layer = {(0, 0): "T", ("out", 0): "T"}
    cases.append(Case(f"layer {dtype}", "layer_norm", {"eps": 1e-5}, [x, weight, bias], layer, {"T": 5}))
    cases.append(Case(f"bare {dtype}", "layer_norm", {"eps": 1e-5}, [x, None, None], layer, {"T": 5}))
    cases.append(
        Case(f"addlayer {dtype}", "add_layer_norm", {"eps": 1e-5}, [x, residual, weight, bias], sizes, {"T": 5})
    )
    # per-head norm of a column slice: rows with two strides, [1, T, heads, D] of a wider buffer
    merged = torch.randn(1, 6, 3 * 16 + 20).to(dtype)
    heads = merged[..., :48].unflatten(-1, (3, 16))
    attrs = {"eps": 1e-6, "offset": 0.0, "weight_fp32": False}
    cases.append(Case(f"heads {dtype}", "rms_norm", attrs, [heads, None], {(0, 1): "T", ("out", 1): "T"}, {"T": 6}))
    return cases


def test_norm_kernels_equal_their_references_at_every_isa_level(check_cases) -> None:
    check_cases(
        [case for dtype in DTYPES for case in _norm_cases(dtype)],
        core=("add torch.float32-7", "add torch.bfloat16-7", "addlayer", "sandwich torch.float32-7"),
    )
