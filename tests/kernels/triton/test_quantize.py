"""Rows quantized by a kernel of their own."""

from __future__ import annotations

import pytest
import torch
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, check_budget

from graphserve.kernels.arg_spec import ArgSpec
from graphserve.kernels.triton import TritonKernel, generate


def case_of(rows: int, width: int, dtype: str = "int8", x_dtype: torch.dtype = torch.float32) -> Case:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(x_dtype)
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", ("out", 0): "T"}
    return Case("quantize", "quantize_rows", {"dtype": dtype}, [x], dynamic, {"T": rows})


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 100), (17, 64), (2, 4096)])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
def test_rows_equal_the_reference(rows: int, width: int, x_dtype: torch.dtype) -> None:
    case_of(rows, width, x_dtype=x_dtype).check()


def test_a_row_too_long_for_one_program_is_read_twice() -> None:
    case_of(2, 20000).check()


def test_fp8_is_rounded_to_the_nearest_even_where_the_target_has_no_instruction() -> None:
    case = case_of(3, 200, "float8_e4m3fn")
    values, scale = case.run("cuda:80")
    expected_values, expected_scale = case.expected()
    assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("target", [DEFAULT_TARGET, *(pytest.param(t, marks=pytest.mark.full) for t in FULL_TARGETS)])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_compiles_stay_within_budget(dtype: str, target: str) -> None:
    outputs = [ArgSpec(dtype, ("T", 4096)), ArgSpec("float32", ("T", 1))]
    kernel = generate("gs.quantize_rows", {"dtype": dtype}, [ArgSpec("bfloat16", ("T", 4096))], outputs, target)
    assert isinstance(kernel, TritonKernel), kernel
    check_budget(f"quantize_rows.{dtype}", kernel, target, "budgets_gemm")
