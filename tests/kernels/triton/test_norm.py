"""Norm kernels against their reference ops, in the interpreter and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, check_budget, check_golden_source

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.triton import TritonKernel, generate
from graphserve.kernels.triton.norm import ARGUMENTS, RESULTS

QUANTIZING = ("rms_norm_quant", "add_rms_norm_quant")
TARGETS = [DEFAULT_TARGET, *(pytest.param(target, marks=pytest.mark.full) for target in FULL_TARGETS)]


def attributes(op: str, offset: float = 0.0, weight_fp32: bool = False, dtype: str = "int8") -> dict[str, Any]:
    if "layer_norm" in op:
        return {"eps": 1e-5}
    attrs: dict[str, Any] = {"eps": 1e-5, "offset": offset, "weight_fp32": weight_fp32}
    if op == "norm_add_rms_norm":
        attrs = {"post_eps": 1e-6, **attrs}
    return {**attrs, "dtype": dtype} if op in QUANTIZING else attrs


def norm_case(op: str, rows: int, width: int, rows_dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    torch.manual_seed(rows * width)
    args: list[Tensor | None] = [
        torch.randn(rows, width).to(rows_dtype) if name in ("x", "residual") else torch.randn(width).to(rows_dtype)
        for name in ARGUMENTS[op]
    ]
    dynamic: dict[tuple[int | str, int], str] = {
        (i, 0): "T" for i, name in enumerate(ARGUMENTS[op]) if name in ("x", "residual")
    }
    name = f"{op}-{rows}x{width}"
    return Case(name, op, attributes(op, **changes), args, {**dynamic, ("out", 0): "T"}, {"T": rows})


def serving_kernel(op: str, width: int, target: str, **changes: Any) -> TritonKernel:
    """The kernel of a bf16 model's launch."""
    rows, weight = ArgSpec("bfloat16", (1, "T", width)), ArgSpec("bfloat16", (width,))
    args: list[ArgSpec | None] = [rows if name in ("x", "residual") else weight for name in ARGUMENTS[op]]
    attrs = attributes(op, **changes)
    special = {"quantized": ArgSpec(attrs.get("dtype", ""), rows.shape), "scale": ArgSpec("float32", (1, "T", 1))}
    kernel = generate(op, attrs, args, [special.get(name, rows) for name in RESULTS[op]], target)
    assert isinstance(kernel, TritonKernel), kernel
    return kernel


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 100), (5, 8), (2, 2560), (33, 128)])
def test_every_form_gives_the_references_result(op: str, rows: int, width: int) -> None:
    norm_case(op, rows, width).check()


@pytest.mark.parametrize("op", ["add_rms_norm", "norm_add_rms_norm", "rms_norm_quant"])
@pytest.mark.parametrize("weight_fp32", [False, True])
def test_both_weight_forms_with_an_offset(op: str, weight_fp32: bool) -> None:
    norm_case(op, 3, 96, offset=1.0, weight_fp32=weight_fp32).check()


@pytest.mark.parametrize("op", [op for op in ARGUMENTS if op not in QUANTIZING])
@pytest.mark.parametrize("weight_fp32", [False, True])
def test_fp16_is_rounded_where_the_reference_rounds(op: str, weight_fp32: bool) -> None:
    case = norm_case(op, 4, 320, torch.float16, offset=1.0, weight_fp32=weight_fp32)
    case.check(relative=1e-3, absolute=1e-4)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "norm_add", "layer_norm", "add_layer_norm"])
def test_absent_weights(op: str) -> None:
    case = norm_case(op, 3, 72)
    case.args = [a if name in ("x", "residual") else None for name, a in zip(ARGUMENTS[op], case.args, strict=True)]
    case.check()


def test_a_weight_wider_than_the_rows() -> None:
    case = norm_case("rms_norm", 3, 64, torch.float16)
    case.args[1] = torch.randn(64)
    case.check(relative=1e-3, absolute=1e-4)


def test_the_longest_rows() -> None:
    norm_case("add_rms_norm", 2, 16384).check()


@pytest.mark.parametrize("op", QUANTIZING)
@pytest.mark.parametrize(
    # fp8 only where kernels make it in integers: the interpreter's own conversion loses a carry into the exponent.
    ("dtype", "target"),
    [("int8", DEFAULT_TARGET), ("float8_e4m3fn", "cuda:80"), ("float8_e4m3fn", "hip:gfx942")],
)
def test_quantized_rows_and_scales(op: str, dtype: str, target: str) -> None:
    norm_case(op, 5, 200, dtype=dtype).check(target=target)


def test_rows_of_zeros_quantize_to_zeros() -> None:
    case = norm_case("rms_norm_quant", 2, 64)
    assert case.args[0] is not None
    case.args[0].zero_()
    quantized, scale = case.run()
    assert not quantized.any() and (scale > 0).all()


def test_heads_of_a_merged_projection_are_rows_with_two_strides() -> None:
    merged = torch.randn(1, 5, 12, 64)
    x = merged[:, :, 2:6]
    case = Case(
        "heads", "rms_norm", attributes("rms_norm"), [x, torch.randn(64)], {(0, 1): "T", ("out", 1): "T"}, {"T": 5}
    )
    case.check()


def test_rows_that_are_too_long_are_refused() -> None:
    rows = ArgSpec("float32", ("T", 20000))
    refusal = generate("rms_norm", attributes("rms_norm"), [rows, None], [rows], DEFAULT_TARGET)
    assert isinstance(refusal, Refusal) and "20000" in refusal.reason and "16384" in refusal.reason


def test_integer_rows_are_refused() -> None:
    rows = ArgSpec("int32", ("T", 64))
    refusal = generate("rms_norm", attributes("rms_norm"), [rows, None], [rows], DEFAULT_TARGET)
    assert isinstance(refusal, Refusal) and "x is int32" in refusal.reason


@pytest.mark.parametrize("op", ["add_rms_norm", "norm_add_rms_norm", "add_rms_norm_quant"])
def test_the_source_is_the_golden_one(op: str) -> None:
    offset = 1.0 if op == "norm_add_rms_norm" else 0.0
    width = 2560 if offset else 4096
    check_golden_source(op, serving_kernel(op, width, DEFAULT_TARGET, offset=offset, weight_fp32=bool(offset)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("op", "width", "dtype"),
    [
        ("add_rms_norm", 4096, "int8"),
        pytest.param("rms_norm", 128, "int8", marks=pytest.mark.full),
        pytest.param("add_layer_norm", 768, "int8", marks=pytest.mark.full),
        ("norm_add_rms_norm", 2560, "int8"),
        pytest.param("norm_add", 16384, "int8", marks=pytest.mark.full),
        ("add_rms_norm_quant", 4096, "float8_e4m3fn"),
        pytest.param("add_rms_norm_quant", 8192, "int8", marks=pytest.mark.full),
    ],
)
def test_compiled_kernels_stay_within_budget(op: str, width: int, dtype: str, target: str) -> None:
    changes = {"dtype": dtype} if op in QUANTIZING else {}
    name = f"{op}-{width}" + (f"-{dtype}" if changes else "")
    check_budget(name, serving_kernel(op, width, target, **changes), target)
