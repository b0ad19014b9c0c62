"""Rotation and cache writes against their reference ops, in the interpreter and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, check_budget, check_golden_source

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.rope import STYLES
from graphserve.kernels.triton import TritonKernel, generate

TARGETS = [DEFAULT_TARGET, *(pytest.param(target, marks=pytest.mark.full) for target in FULL_TARGETS)]
NORM = {"eps": 1e-6, "offset": 0.0, "weight_fp32": False}
BLOCKS, BLOCK_SIZE = 5, 4


def cache(kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A strided view into a pool, as the runner's cache layers are."""
    pool = torch.zeros(BLOCKS, kv_heads * BLOCK_SIZE * dim + 64, dtype=torch.float32).to(dtype)
    return pool[:, : kv_heads * BLOCK_SIZE * dim].view(BLOCKS, kv_heads, BLOCK_SIZE, dim)


def rope_kv_case(
    tokens: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    rotary: int,
    style: str = "half",
    norms: bool = True,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    **attrs: Any,
) -> Case:
    """q, k and v as column slices of one merged projection; fp8 caches use the quantizing op."""
    torch.manual_seed(tokens + rotary)
    (num_q, num_kv), (dim, v_dim) = heads, dims
    sizes = (num_q * dim, num_kv * dim, num_kv * v_dim)
    merged = torch.randn(tokens, sum(sizes)).to(dtype)
    q, k, v = (
        part.unflatten(1, (count, -1))
        for part, count in zip(merged.split(sizes, 1), (num_q, num_kv, num_kv), strict=True)
    )
    tables = [torch.randn(32, rotary).to(dtype) if rotary else None for _ in range(2)]
    weights = [torch.rand(dim).add(0.5).to(dtype) if norms else None for _ in range(2)]
    caches = [cache(num_kv, dim, cache_dtype or dtype), cache(num_kv, v_dim, cache_dtype or dtype)]
    slots = torch.randperm((BLOCKS - 1) * BLOCK_SIZE)[:tokens] + BLOCK_SIZE
    args: list[Tensor | None] = [q, k, v, *tables, torch.randint(0, 32, (tokens,)), *weights, *caches, slots]
    op = "rope_kv_write"
    if cache_dtype is not None and cache_dtype.itemsize == 1:
        op, args = "rope_kv_write_quant", [*args, torch.tensor([0.5]), None]
    dynamic: dict[tuple[int | str, int], str] = {(i, 0): "T" for i in (0, 1, 2, 5, 10, "out")}
    dynamic |= {(8, 0): "num_blocks", (9, 0): "num_blocks"}
    return Case(op, op, {**NORM, **attrs, "style": style}, args, dynamic, {"T": tokens}, mutated=(8, 9))


def check_cache_case(case: Case, relative: float = 1e-5) -> None:
    """Like ``Case.check``; fp8 caches are compared as bytes."""
    for actual, expected in zip(case.run("cuda:80"), case.expected(), strict=True):
        if expected.dtype == torch.float8_e4m3fn:
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
        else:
            torch.testing.assert_close(actual, expected, rtol=relative, atol=relative)


def serving_kernel(
    target: str, heads: tuple[int, int], dim: int, rotary: int, norms: bool, cache_dtype: str = "bfloat16", **attrs: Any
) -> TritonKernel:
    """The kernel of a bf16 model's launch, with blocks of 16 tokens."""
    (num_q, num_kv), row = heads, (heads[0] + 2 * heads[1]) * dim
    q, k = (ArgSpec("bfloat16", ("T", count, dim), (row, dim, 1)) for count in heads)
    table = ArgSpec("bfloat16", (4096, rotary)) if rotary else None
    weight = ArgSpec("bfloat16", (dim,)) if norms else None
    layer = ArgSpec(cache_dtype, ("num_blocks", num_kv, 16, dim))
    ints = ArgSpec("int64", ("T",))
    args = [q, k, k, table, table, ints, weight, weight, layer, layer, ints]
    op, scale = "rope_kv_write", ArgSpec("float32", (1,))
    if cache_dtype.startswith("float8"):
        op, args = "rope_kv_write_quant", [*args, scale, scale]
    attrs = {**NORM, "style": "half", **attrs}
    kernel = generate(op, attrs, args, [ArgSpec("bfloat16", ("T", num_q, dim))], target)
    assert isinstance(kernel, TritonKernel), kernel
    return kernel


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("tokens", "heads", "dims", "rotary"),
    [
        (1, (1, 1), (8, 8), 8),
        (3, (8, 2), (16, 16), 8),
        (5, (5, 5), (80, 80), 80),
        (2, (6, 3), (96, 64), 48),
        (2, (32, 8), (128, 128), 128),
    ],
)
def test_norm_rotation_and_write(
    style: str, tokens: int, heads: tuple[int, int], dims: tuple[int, int], rotary: int
) -> None:
    rope_kv_case(tokens, heads, dims, rotary, style).check()


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rotary", [0, 12])
def test_without_norm_and_without_rotation(norms: bool, rotary: int) -> None:
    rope_kv_case(3, (4, 2), (24, 24), rotary, norms=norms).check()


@pytest.mark.parametrize("weight_fp32", [False, True])
def test_both_weight_forms_with_an_offset(weight_fp32: bool) -> None:
    rope_kv_case(3, (4, 1), (32, 32), 32, offset=1.0, weight_fp32=weight_fp32).check()


@pytest.mark.parametrize("style", STYLES)
def test_fp16_rotates_in_fp32(style: str) -> None:
    case = rope_kv_case(3, (4, 2), (64, 64), 32, style, dtype=torch.float16)
    case.check(relative=4e-3, absolute=4e-3)


def test_a_cache_of_another_float_type() -> None:
    rope_kv_case(3, (4, 2), (32, 32), 32, cache_dtype=torch.float16).check(relative=1e-3, absolute=1e-4)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_an_fp8_cache_holds_scaled_and_saturated_values(style: str) -> None:
    case = rope_kv_case(4, (4, 2), (32, 48), 16, style, norms=False, cache_dtype=torch.float8_e4m3fn)
    assert case.args[2] is not None
    case.args[2][0, 0, :2] = torch.tensor([1e4, -1e4])
    check_cache_case(case)
    stored = case.run("cuda:80")[2].float()
    assert stored.max() == 448.0 and stored.min() == -448.0


def test_writing_the_cache_alone() -> None:
    case = rope_kv_case(4, (4, 2), (32, 48), 16)
    k, v, kv_k, kv_v, slots = case.args[1], case.args[2], case.args[8], case.args[9], case.args[10]
    dynamic: dict[tuple[int | str, int], str] = {(i, 0): "T" for i in (0, 1, 4)}
    Case("kv_write", "kv_write", {}, [k, v, kv_k, kv_v, slots], dynamic, {"T": 4}, mutated=(2, 3)).check()
    fp8 = [cache(2, dim, torch.float8_e4m3fn) for dim in (32, 48)]
    args = [k, v, *fp8, slots, None, torch.tensor([0.25])]
    check_cache_case(Case("fp8", "kv_write_quant", {}, args, dynamic, {"T": 4}, mutated=(2, 3)))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("heads_first", [False, True])
def test_rotation_alone_in_both_layouts(style: str, heads_first: bool) -> None:
    tokens, heads, dim = 5, 3, 40
    x = torch.randn(1, heads, tokens, dim) if heads_first else torch.randn(1, tokens, heads, dim)
    cos, sin = torch.randn(1, tokens, 24), torch.randn(1, tokens, 24)
    axis = 2 if heads_first else 1
    dynamic: dict[tuple[int | str, int], str] = {(0, axis): "T", (1, 1): "T", (2, 1): "T", ("out", axis): "T"}
    attrs = {"style": style, "heads_first": heads_first}
    Case("rope", "rope", attrs, [x, cos, sin], dynamic, {"T": tokens}).check()


def test_rotation_alone_with_strides_that_depend_on_the_number_of_tokens() -> None:
    tokens, x = 6, torch.randn(1, 3, 6, 16)
    cos, sin = torch.randn(1, tokens, 16), torch.randn(1, tokens, 16)
    spec = ArgSpec("float32", (1, 3, "T", 16), ("48*T", "16*T", 16, 1))
    table = ArgSpec("float32", (1, "T", 16))
    kernel = generate("rope", {"style": "half", "heads_first": True}, [spec, table, table], [spec], DEFAULT_TARGET)
    assert isinstance(kernel, TritonKernel) and kernel.scalars == ("T",), kernel
    from graphserve.kernels.triton.compile import interpret

    out = torch.full_like(x, float("nan"))
    interpret(kernel, [x, cos, sin, out], {"T": tokens})
    torch.testing.assert_close(out, torch.ops.gs.rope(x, cos, sin, "half", True))


def test_an_unknown_style_and_odd_rotary_columns_are_refused() -> None:
    x, table = ArgSpec("float32", (1, "T", 2, 16)), ArgSpec("float32", (1, "T", 7))
    for style, word in (("spiral", "spiral"), ("half", "even")):
        refusal = generate("rope", {"style": style, "heads_first": False}, [x, table, table], [x], DEFAULT_TARGET)
        assert isinstance(refusal, Refusal) and word in refusal.reason


def test_a_table_without_its_partner_is_refused() -> None:
    case = rope_kv_case(2, (2, 1), (16, 16), 16)
    args = [None if a is None else case._spec(a, i) for i, a in enumerate(case.args)]
    args[4] = None
    refusal = generate("rope_kv_write", case.attrs, args, [args[0]], DEFAULT_TARGET)  # type: ignore[list-item]
    assert isinstance(refusal, Refusal) and "both" in refusal.reason


def test_the_source_is_the_golden_one() -> None:
    check_golden_source("rope_kv_write", serving_kernel(DEFAULT_TARGET, (32, 8), 128, 128, norms=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("heads", "dim", "rotary", "norms", "cache_dtype", "style"),
    [
        ((32, 8), 128, 128, True, "bfloat16", "half"),
        pytest.param((32, 8), 128, 128, False, "float8_e4m3fn", "half", marks=pytest.mark.full),
        pytest.param((8, 4), 256, 256, True, "bfloat16", "half", marks=pytest.mark.full),
        pytest.param((32, 32), 80, 32, False, "bfloat16", "half", marks=pytest.mark.full),
        pytest.param((32, 8), 128, 128, False, "bfloat16", "interleaved", marks=pytest.mark.full),
        pytest.param((48, 8), 128, 128, False, "bfloat16", "interleaved", marks=pytest.mark.full),
    ],
)
def test_compiled_kernels_stay_within_budget(
    heads: tuple[int, int], dim: int, rotary: int, norms: bool, cache_dtype: str, style: str, target: str
) -> None:
    kernel = serving_kernel(target, heads, dim, rotary, norms, cache_dtype, style=style)
    name = f"rope_kv_write-{heads[0]}-{heads[1]}x{dim}-{rotary}-{style}{'-norm' * norms}-{cache_dtype}"
    check_budget(name, kernel, target)
