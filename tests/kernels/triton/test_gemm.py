"""Linear layers as GEMV, GEMM and split-K GEMM: the interpreter against the reference, compiles against budgets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, check_budget, check_golden_source

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.triton import TritonKernel, evaluate, generate

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def linear_case(
    product: str, rows: int, n: int, k: int, dtype: torch.dtype = torch.float32, op: str = "linear", bias: bool = True
) -> Case:
    """One launch on ``rows`` rows; the attribute ``product`` chooses the kernel."""
    x, weight = drawn(1, rows, k, dtype=dtype), drawn(n, k, dtype=dtype) / k**0.5
    args: list[Tensor | None] = [x, weight, drawn(n, dtype=dtype) if bias else None]
    dynamic: dict[tuple[int | str, int], str] = {(0, 1): "T", ("out", 1): "T"}
    if op == "linear_add":
        args.append(drawn(1, rows, n, dtype=dtype, seed=1))
        dynamic[3, 1] = "T"
    case = Case(f"{op}-{product}", op, {}, args, dynamic, {"T": rows})
    return with_product(case, product, rows)


def with_product(case: Case, product: str, rows: int) -> Case:
    """The case with a kernel chosen by attributes that are a lowering's and no part of the op."""
    op = getattr(torch.ops.gs, case.op)
    case.reference = lambda *args, product, bucket_rows, **attrs: op(*args, **attrs)
    case.attrs = {**case.attrs, "product": product, "bucket_rows": rows}
    return case


# A GEMV program computes one value of one row where N is this small, and the interpreter runs one after the other.
@pytest.mark.parametrize(
    ("product", "rows"),
    [("gemv", 1), ("gemv", 3), *((product, rows) for product in ("gemm", "split_k") for rows in (1, 3, 16, 17))],
)
def test_products_of_few_rows_equal_the_reference(product: str, rows: int) -> None:
    linear_case(product, rows, 16 if product == "gemv" else 48, 160).check()


@pytest.mark.parametrize("product", ["gemv", "gemm", "split_k"])
@pytest.mark.parametrize(("n", "k"), [(33, 72), (7, 24), (130, 200)])
def test_sizes_that_are_no_multiple_of_a_block(product: str, n: int, k: int) -> None:
    linear_case(product, 1 if product == "gemv" else 5, n, k).check()


@pytest.mark.parametrize("product", ["gemv", "gemm", "split_k"])
def test_fp16_operands_are_summed_in_fp32(product: str) -> None:
    linear_case(product, 1, 40, 512, torch.float16).check(2e-3, 2e-3)


def test_no_bias_and_many_row_tiles() -> None:
    case = linear_case("gemm", 70, 40, 96, bias=False)
    case.attrs["bucket_rows"] = 16  # five tiles of rows, one of which is not full
    case.check()


@pytest.mark.parametrize("product", ["gemv", "gemm", "split_k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_residual_is_added_to_the_rounded_product(product: str, dtype: torch.dtype) -> None:
    linear_case(product, 2, 16, 96, dtype, "linear_add").check(TOLERANCE[dtype], TOLERANCE[dtype])


def test_strided_rows_are_read_where_they_lie() -> None:
    merged = drawn(1, 4, 3 * 64)
    x, weight = merged[..., 64:128], drawn(40, 64)
    case = Case("strided", "linear", {}, [x, weight, None], {(0, 1): "T", ("out", 1): "T"}, {"T": 4})
    with_product(case, "gemm", 4).check()


def quantized_case(product: str, rows: int, activations: bool, n: int = 20, k: int = 200) -> Case:
    weight, scale = torch.ops.gs.quantize_rows(drawn(n, k), "int8")
    x, scale, bias = drawn(1, rows, k), scale.reshape(-1), drawn(n)
    dynamic: dict[tuple[int | str, int], str] = {(0, 1): "T", ("out", 1): "T"}
    if not activations:
        return with_product(
            Case("w8", "linear_w8", {}, [x, weight, scale, bias], dynamic, {"T": rows}), product, rows
        )  # fmt: skip
    x_q, x_scale = torch.ops.gs.quantize_rows(x, "int8")
    case = Case(
        "w8a8", "linear_w8a8", {"dtype": "float32"}, [x_q, x_scale, weight, scale, bias], {**dynamic, (1, 1): "T"},
        {"T": rows},
    )  # fmt: skip
    return with_product(case, product, rows)


@pytest.mark.parametrize(("product", "rows"), [("gemv", 1), ("gemm", 3), ("gemm", 17), ("split_k", 17)])
@pytest.mark.parametrize("activations", [False, True])
def test_int8_weights_with_and_without_int8_activations(product: str, activations: bool, rows: int) -> None:
    quantized_case(product, rows, activations).check()


@pytest.mark.parametrize("product", ["gemv", "gemm"])
def test_fp8_weights_widen_on_the_way(product: str) -> None:
    weight, scale = torch.ops.gs.quantize_rows(drawn(12, 104), "float8_e4m3fn")
    case = Case(
        "fp8", "linear_w8", {}, [drawn(1, 3, 104), weight, scale.reshape(-1), None], {(0, 1): "T", ("out", 1): "T"},
        {"T": 3},
    )  # fmt: skip
    with_product(case, product, 3).check()


def bf16_linear(
    rows: int, n: int = 4096, k: int = 4096, target: str = DEFAULT_TARGET, product: str = "auto", op: str = "linear",
    dtypes: tuple[str, str] = ("bfloat16", "bfloat16"),
) -> TritonKernel | list[TritonKernel] | Refusal:  # fmt: skip
    x, weight, out = ArgSpec(dtypes[0], ("T", k)), ArgSpec(dtypes[1], (n, k)), ArgSpec("bfloat16", ("T", n))
    scale, x_scale = ArgSpec("float32", (n,)), ArgSpec("float32", ("T", 1))
    args = {"linear": [x, weight, None], "linear_w8": [x, weight, scale, None],
            "linear_w8a8": [x, x_scale, weight, scale, None]}[op]  # fmt: skip
    attrs = {"bucket_rows": rows, "product": product}
    if op == "linear_w8a8":
        attrs["dtype"] = "bfloat16"
    return generate(f"gs.{op}", attrs, args, [out], target)


def test_one_row_is_a_gemv_few_a_gemm_and_more_the_librarys() -> None:
    one, sixteen, many = (bf16_linear(rows) for rows in (1, 16, 17))
    assert isinstance(one, TritonKernel) and "BLOCK_M" not in one.constexprs
    assert isinstance(sixteen, TritonKernel) and sixteen.constexprs["BLOCK_M"] == 16
    assert isinstance(many, Refusal) and "torch.mm" in many.reason


def test_buckets_with_one_tile_share_one_kernel() -> None:
    assert bf16_linear(4) == bf16_linear(16)


def test_an_unknown_product_and_unequal_dtypes_are_refused() -> None:
    unknown = bf16_linear(1, product="fast")
    assert isinstance(unknown, Refusal) and "gemv, gemm, split_k" in unknown.reason
    mixed = bf16_linear(1, dtypes=("bfloat16", "float16"))
    assert isinstance(mixed, Refusal) and "must be equal" in mixed.reason


def test_fp8_is_refused_where_there_are_no_instructions_for_it() -> None:
    refusal = bf16_linear(16, op="linear_w8", dtypes=("bfloat16", "float8_e4m3fn"), target="cuda:80")
    assert isinstance(refusal, Refusal) and "cuda:80" in refusal.reason


@pytest.mark.parametrize("rows", [1, 16, 700])
def test_the_grid_covers_the_result_and_the_scratch_the_parts(rows: int) -> None:
    kernel = bf16_linear(rows, 1000, 4096, product="gemm")
    assert isinstance(kernel, TritonKernel)
    block_m, block_n = int(kernel.constexprs["BLOCK_M"]), int(kernel.constexprs["BLOCK_N"])
    assert evaluate(kernel.grid[0], {"T": rows}) == -(-rows // block_m) * -(-1000 // block_n)
    parts = bf16_linear(rows, 1000, 4096, product="split_k")
    assert isinstance(parts, list) and len(parts) == 2
    splits = parts[0].grid[1]
    assert isinstance(splits, int) and splits >= 2
    assert parts[0].scratch == parts[1].scratch and evaluate(parts[0].scratch, {"T": rows}) == rows * 1000 * 4 * splits


# name → launch; decode of an 8B model's output projection, its quantized forms, and a prefill tile.
BUDGETS = {
    "linear_gemv": {"rows": 1},
    "linear_gemm16": {"rows": 16},
    "linear_gemm2048": {"rows": 2048, "product": "gemm"},
    "linear_split_k16": {"rows": 16, "product": "split_k", "n": 1024},
    "linear_w8_gemm16": {"rows": 16, "op": "linear_w8", "dtypes": ("bfloat16", "int8")},
    "linear_w8a8_gemm64": {"rows": 64, "op": "linear_w8a8", "dtypes": ("int8", "int8")},
    "linear_fp8_gemm64": {"rows": 64, "op": "linear_w8a8", "dtypes": ("float8_e4m3fn", "float8_e4m3fn")},
}
ALL = [(name, target) for name in BUDGETS for target in (DEFAULT_TARGET, *FULL_TARGETS)
       if (name, target) != ("linear_fp8_gemm64", "cuda:80")]  # fmt: skip
DEFAULT = [("linear_gemv", DEFAULT_TARGET), ("linear_gemm16", DEFAULT_TARGET), ("linear_w8a8_gemm64", DEFAULT_TARGET)]


def check_linear_budget(name: str, target: str) -> None:
    options = dict(BUDGETS[name])
    kernels = bf16_linear(options.pop("rows"), target=target, **options)  # type: ignore[arg-type]
    assert not isinstance(kernels, Refusal), kernels
    for index, kernel in enumerate([kernels] if isinstance(kernels, TritonKernel) else kernels):
        check_budget(f"{name}.{index}", kernel, target, "budgets_gemm")


@pytest.mark.parametrize(("name", "target"), DEFAULT)
def test_compiles_stay_within_budget(name: str, target: str) -> None:
    check_linear_budget(name, target)


@pytest.mark.full
@pytest.mark.parametrize(("name", "target"), [pair for pair in ALL if pair not in DEFAULT])
def test_compiles_stay_within_budget_on_every_target(name: str, target: str) -> None:
    check_linear_budget(name, target)


def test_matrix_kernels_use_the_matrix_units_and_vector_loads() -> None:
    from graphserve.kernels.triton.compile import compile_for

    gemv, gemm = bf16_linear(1), bf16_linear(16)
    assert isinstance(gemv, TritonKernel) and isinstance(gemm, TritonKernel)
    assert compile_for(gemv, DEFAULT_TARGET).num_mma == 0 and compile_for(gemm, DEFAULT_TARGET).num_mma > 0
    assert compile_for(gemv, DEFAULT_TARGET).num_vector_loads_128 >= 4
    assert compile_for(gemm, DEFAULT_TARGET).num_vector_loads_128 >= 4


def test_the_text_is_that_of_the_golden_files() -> None:
    for name, rows in (("linear_gemv", 1), ("linear_gemm16", 16)):
        kernel = bf16_linear(rows)
        assert isinstance(kernel, TritonKernel)
        check_golden_source(name, kernel)


def test_a_gemv_of_several_columns_a_program() -> None:
    case = linear_case("gemv", 1, 531, 64)
    assert case.kernels()[0].constexprs["BLOCK_N"] == 2
    case.check()
