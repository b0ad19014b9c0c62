"""Generated groups of elementwise ops against the ATen calls they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, check_budget, check_golden_source

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.pointwise_program import Instruction, PointwiseProgram
from graphserve.kernels.triton import TritonKernel, generate

TARGETS = [DEFAULT_TARGET, *(pytest.param(target, marks=pytest.mark.full) for target in FULL_TARGETS)]


def program(num_inputs: int, *instructions: tuple[Any, ...], results: tuple[int, ...] = ()) -> str:
    """``("mul.Tensor", 0, 1)`` with ints standing for values; a float is a number, a dict or list itself."""
    made = []
    for op, *args in instructions:
        dtype, kwargs = "float32", {}
        if args and isinstance(args[-1], dict) and "f" not in args[-1]:
            kwargs = dict(args.pop())
            dtype = kwargs.pop("_dtype", dtype)
        made.append(Instruction(f"aten.{op}", tuple({"v": a} if type(a) is int else a for a in args), dtype, kwargs))
    last = num_inputs + len(made) - 1
    return PointwiseProgram(num_inputs, tuple(made), results or (last,)).encode()


def reference(*inputs: Tensor, program: str) -> list[Tensor]:
    return torch.ops.gs.pointwise(list(inputs), program)


def group_case(text: str, *inputs: Tensor, dynamic: dict[tuple[int | str, int], str] | None = None) -> Case:
    tokens = inputs[0].shape[1 if dynamic and (0, 1) in dynamic else 0]
    dynamic = {(0, 0): "T", ("out", 0): "T"} if dynamic is None else dynamic
    return Case("group", "pointwise", {"program": text}, list(inputs), dynamic, {"T": tokens}, reference=reference)


SOFTCAP = program(1, ("div.Tensor", 0, 30.0), ("tanh.default", 1), ("mul.Tensor", 2, 30.0))


def test_a_soft_cap_near_zero_and_far_from_it() -> None:
    x = torch.cat([torch.logspace(-6, 3, 60), -torch.logspace(-6, 3, 60)]).reshape(3, 40)
    group_case(SOFTCAP, x).check(absolute=0.0)


@pytest.mark.parametrize("width", [1, 7, 64, 1500])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_columns_and_numbers_broadcast(tokens: int, width: int) -> None:
    text = program(4, ("mul.Tensor", 0, 1), ("add.Tensor", 4, 2, {"alpha": 2.0}), ("sub.Tensor", 5, 3))
    inputs = torch.randn(tokens, width), torch.randn(width), torch.randn(tokens, 1), torch.tensor(0.3)
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", (2, 0): "T", ("out", 0): "T"}
    group_case(text, *inputs, dynamic=dynamic).check()


def test_heads_that_share_a_row_of_another_tensor() -> None:
    text = program(2, ("mul.Tensor", 0, 1), ("sigmoid.default", 2))
    x, gate = torch.randn(5, 3, 16), torch.randn(5, 1, 16)
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", (1, 0): "T", ("out", 0): "T"}
    group_case(text, x, gate, dynamic=dynamic).check()


def test_every_other_column_of_a_wider_tensor() -> None:
    text = program(2, ("mul.Tensor", 0, 1))
    wide = torch.randn(4, 60)
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", (1, 0): "T", ("out", 0): "T"}
    group_case(text, wide[:, ::2], wide[:, 1::2], dynamic=dynamic).check()


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_rows_as_long_as_the_step(tokens: int) -> None:
    text = program(1, ("neg.default", 0, {"_dtype": "int64"}))
    positions = torch.arange(tokens)[None]
    group_case(text, positions, dynamic={(0, 1): "T", ("out", 1): "T"}).check()


def test_a_router_softmax_with_normalised_rows() -> None:
    text = program(
        1,
        ("_softmax.default", 0, -1.0, False),
        ("sum.dim_IntList", 1, [-1], True),
        ("div.Tensor", 1, 2),
        results=(3, 2),
    ).replace("-1.0", "-1")
    group_case(text, torch.randn(5, 60) * 4).check()


@pytest.mark.parametrize("op", ["sum.dim_IntList", "mean.dim", "amax.default", "amin.default"])
@pytest.mark.parametrize("width", [16, 100])
def test_rows_reduced_and_used_again(op: str, width: int) -> None:
    text = program(1, (op, 0, [-1], True), ("sub.Tensor", 0, 1))
    group_case(text, torch.randn(9, width) - 2).check()


def test_masks_comparisons_and_integers() -> None:
    text = program(
        2,
        ("gt.Scalar", 0, 0.5, {"_dtype": "bool"}),
        ("ge.Tensor", 1, 1, {"_dtype": "bool"}),
        ("logical_and.default", 2, 3, {"_dtype": "bool"}),
        ("logical_not.default", 4, {"_dtype": "bool"}),
        ("where.self", 5, 0, 1),
        ("masked_fill.Scalar", 6, 4, {"f": "-inf"}),
        ("_to_copy.default", 5, {"_dtype": "int64", "dtype": {"dtype": "int64"}}),
        ("mul.Tensor", 8, 8, {"_dtype": "int64"}),
        results=(7, 9, 4),
    )
    torch.manual_seed(0)
    x, y = torch.randn(4, 30), torch.randn(4, 30)
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", (1, 0): "T", ("out", 0): "T"}
    case = group_case(text, x, y, dynamic=dynamic)
    for actual, expected in zip(case.run(), case.expected(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "instruction",
    [
        *((f"{op}.default", 0) for op in ("exp", "sqrt", "rsqrt", "reciprocal", "log", "sin", "cos", "erf", "floor")),
        *((f"{op}.default", 0) for op in ("neg", "abs", "relu", "silu", "square", "exp2", "log2", "ceil")),
        *(("pow.Tensor_Scalar", 0, exponent) for exponent in (2.0, 3.0, 0.5, -0.5, -1.0)),
        ("gelu.default", 0),
        ("gelu.default", 0, {"approximate": "tanh"}),
        ("clamp.default", 0, 0.5, 1.5),
        ("clamp_min.default", 0, 0.5),
        ("clamp_max.default", 0, 0.5),
        ("rsub.Scalar", 0, 1.0),
        ("maximum.default", 0, 0),
        ("full_like.default", 0, 2.5),
    ],
)
def test_each_op_alone(instruction: tuple[Any, ...]) -> None:
    group_case(program(1, instruction), torch.rand(3, 50) * 2 + 0.1).check()


def test_fp16_is_rounded_after_every_op() -> None:
    half = {"_dtype": "float16"}
    text = program(2, ("mul.Tensor", 0, 1, half), ("add.Tensor", 2, 0, half), ("mul.Tensor", 3, 0.1, half))
    torch.manual_seed(0)
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", (1, 0): "T", ("out", 0): "T"}
    case = group_case(text, torch.randn(7, 200).half(), torch.randn(7, 200).half(), dynamic=dynamic)
    assert torch.equal(case.run()[0], case.expected()[0])


BINARY = ("add.Tensor", "sub.Tensor", "mul.Tensor", "maximum.default", "minimum.default")
UNARY = ("sigmoid.default", "tanh.default", "neg.default", "relu.default", "cos.default")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_program_gives_what_its_calls_give_one_by_one(data: st.DataObject) -> None:
    shapes = {0: (3, 20), 1: (20,), 2: (3, 1)}
    instructions: list[tuple[Any, ...]] = []
    for count in range(data.draw(st.integers(1, 8))):
        value = st.integers(0, 2 + count)
        if data.draw(st.booleans()):
            instructions.append((data.draw(st.sampled_from(BINARY)), data.draw(value), data.draw(value)))
        else:
            instructions.append((data.draw(st.sampled_from(UNARY)), data.draw(value)))
    last = 2 + len(instructions)
    instructions.append(("add.Tensor", 0, last))  # the result has the group's shape
    torch.manual_seed(data.draw(st.integers(0, 99)))
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", (2, 0): "T", ("out", 0): "T"}
    group_case(program(3, *instructions), *(torch.randn(s) for s in shapes.values()), dynamic=dynamic).check(
        relative=1e-4, absolute=1e-4
    )


def refusal(
    text: str, *shapes: tuple[int | str, ...], dtype: str = "float32", out: tuple[int | str, ...] = ("T", 8)
) -> str:
    result = generate(
        "pointwise", {"program": text}, [ArgSpec(dtype, s) for s in shapes], [ArgSpec(dtype, out)], "cuda:90"
    )
    assert isinstance(result, Refusal), result
    return result.reason


def test_what_a_group_cannot_hold_is_refused_by_name() -> None:
    rows = ("T", 8)
    assert "aten.cumsum.default" in refusal(program(1, ("cumsum.default", 0, [-1])), rows)
    assert "powers" in refusal(program(1, ("pow.Tensor_Scalar", 0, 1.7)), rows)
    assert "reductions" in refusal(program(1, ("sum.dim_IntList", 0, [0], True)), rows)
    assert "broadcast" in refusal(program(2, ("add.Tensor", 0, 1)), rows, ("T", 9))
    assert "one value a row" in refusal(program(2, ("mul.Tensor", 1, 1.0)), rows, (8,), out=(8,))
    assert "float64" in refusal(program(1, ("neg.default", 0)), rows, dtype="float64")
    assert "last dimension" in refusal(program(1, ("amax.default", 0, [-1], True)), (8, "T"), out=(8, 1))


def test_a_program_that_names_a_later_value_is_an_error() -> None:
    with pytest.raises(ValueError, match="names value 3"):
        PointwiseProgram.decode(program(1, ("add.Tensor", 0, 3)))
    with pytest.raises(ValueError, match="results"):
        PointwiseProgram.decode(program(1, ("neg.default", 0), results=(7,)))


def test_the_reference_checks_its_inputs_and_dtypes() -> None:
    with pytest.raises(ValueError, match="takes 2 inputs, got 1"):
        reference(torch.ones(2), program=program(2, ("add.Tensor", 0, 1)))
    with pytest.raises(ValueError, match="gave torch.float32"):
        reference(torch.ones(2), program=program(1, ("neg.default", 0, {"_dtype": "bfloat16"})))


def serving_kernel(target: str) -> TritonKernel:
    """Logits of a bf16 model through a soft cap."""
    bf16 = {"_dtype": "bfloat16"}
    text = program(1, ("div.Tensor", 0, 30.0, bf16), ("tanh.default", 1, bf16), ("mul.Tensor", 2, 30.0, bf16))
    rows = ArgSpec("bfloat16", ("R", 262144))
    kernel = generate("gs.pointwise", {"program": text}, [rows], [rows], target)
    assert isinstance(kernel, TritonKernel), kernel
    return kernel


def test_the_source_is_the_golden_one() -> None:
    check_golden_source("pointwise", serving_kernel(DEFAULT_TARGET))


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels_stay_within_budget(target: str) -> None:
    check_budget("pointwise-softcap", serving_kernel(target), target)
