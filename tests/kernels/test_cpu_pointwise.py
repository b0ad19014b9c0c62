"""Generated groups of elementwise ops against the ATen calls they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cpu_kernel_cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphserve.artifacts import ArtifactStore
from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.cpu import build, compiler, generate, isa_level
from graphserve.kernels.pointwise_program import GROUP_OPS, ROW_OPS, Instruction, PointwiseProgram


def program(num_inputs: int, *instructions: tuple[Any, ...], results: tuple[int, ...] = ()) -> str:
    """``("mul.Tensor", 0, 1)`` with ints standing for values; a float is a number, a dict or list itself.

    ``("mul.Tensor", 0, 0.5, {"_dtype": "bfloat16"})``: the result's dtype, float32 by default, and keyword arguments.
    """
    made = []
    for op, *args in instructions:
        dtype, kwargs = "float32", {}
        if args and isinstance(args[-1], dict) and "f" not in args[-1] and "number" not in args[-1]:
            kwargs = dict(args.pop())
            dtype = kwargs.pop("_dtype", dtype)
        made.append(Instruction(f"aten.{op}", tuple(map(_argument, args)), dtype, kwargs))
    last = num_inputs + len(made) - 1
    return PointwiseProgram(num_inputs, tuple(made), results or (last,)).encode()


def _argument(argument: Any) -> Any:
    if type(argument) is int:
        return {"v": argument}
    return argument["number"] if isinstance(argument, dict) and "number" in argument else argument


def typed(dtype: str, /, **kwargs: Any) -> dict[str, Any]:
    """The last item of an instruction of :func:`program`."""
    return {"_dtype": dtype, **kwargs}


@dataclass
class Group(Case):
    """A program beside its ATen calls in the dtypes that it states."""

    def expected(self) -> list[Tensor]:
        return self._reference(self.args)

    def _reference(self, args: list[Tensor | None]) -> list[Tensor]:
        return torch.ops.gs.pointwise([a.clone(memory_format=torch.preserve_format) for a in args], **self.attrs)


def group(name: str, text: str, *inputs: Tensor, dynamic: dict[tuple[int | str, int], str] | None = None) -> Group:
    """``inputs`` all have their tokens in dimension 0 unless ``dynamic`` says otherwise."""
    tokens = inputs[0].shape[0]
    if dynamic is None:
        dynamic = {(i, 0): "T" for i, x in enumerate(inputs) if x.dim() > 1} | {("out", 0): "T"}
    return Group(name, "pointwise", {"program": text}, list(inputs), dynamic, {"T": tokens}, rounding=2.0)


def run(cases: list[Group], store: ArtifactStore) -> list[tuple[Group, list[Tensor], list[Tensor]]]:
    """Each case with its kernel's results and the expected ones, on two threads."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    kernels = [case.kernel(isa_level()) for case in cases]
    library = build(kernels, store)
    return [
        (case, case.run(library.function_pointer(kernel.symbol), library, 2), case.expected())
        for case, kernel in zip(cases, kernels, strict=True)
    ]


def test_rows_columns_and_numbers_broadcast(check_cases) -> None:
    text = program(4, ("mul.Tensor", 0, 1), ("add.Tensor", 4, 2, {"alpha": 2.0}), ("sub.Tensor", 5, 3))
    cases = []
    for tokens, width in ((1, 1), (5, 7), (3, 64), (2, 9000)):
        inputs = torch.randn(tokens, width), torch.randn(width), torch.randn(tokens, 1), torch.tensor(0.3)
        cases.append(group(f"{tokens}x{width}", text, *inputs))
    check_cases(cases, core=("5x7",))


def test_strides_of_all_kinds_are_followed(check_cases) -> None:
    copy, product = program(1, ("clone.default", 0)), program(2, ("mul.Tensor", 0, 1))
    wide, heads = torch.randn(4, 60), torch.randn(1, 5, 3, 16)
    cases = [
        group("every other column", product, wide[:, ::2], wide[:, 1::2]),
        group("column slices", product, wide[:, 3:23], wide[:, 30:50]),
        group("shared by heads", product, torch.randn(5, 3, 16), torch.randn(5, 1, 16)),
        group("one a row", product, torch.randn(5, 3, 1), torch.randn(5, 1, 1)),
        group("one token", copy, torch.randn(1, 1, 48)),
        group("empty", copy, torch.randn(0, 48)),
    ]
    # Heads first: the stride of the heads grows with the tokens, and the tokens are not the outermost dimension.
    by_heads = {(0, 2): "T", ("out", 2): "T"}
    swapped = group("heads before tokens", copy, heads.transpose(1, 2), dynamic=by_heads)
    swapped.scalars = {"T": 5}
    tokens_last = group("tokens last", copy, heads.permute(0, 2, 3, 1), dynamic={(0, 3): "T", ("out", 3): "T"})
    tokens_last.scalars = {"T": 5}
    check_cases([*cases, swapped, tokens_last], core=("every other", "heads before"))


def test_contiguous_heads_first_tensors_are_one_run_of_elements() -> None:
    shape = (1, 4, "T", 8)
    kernel = generate("gs.pointwise", {"program": program(1, ("neg.default", 0))},
                      [ArgSpec("float32", shape)], [ArgSpec("float32", shape)], isa_level())  # fmt: skip
    assert not isinstance(kernel, Refusal)
    assert "rows = 1, columns" in kernel.entry


def test_rows_are_reduced_and_used_again(check_cases) -> None:
    cases = []
    for dtype, width in (("float32", 100), ("float32", 16), ("bfloat16", 100)):
        kind = typed(dtype)
        reductions = [
            (op, 0, [-1], True, kind) for op in ("sum.dim_IntList", "mean.dim", "amax.default", "amin.default")
        ]
        text = program(
            1,
            *reductions,
            *(("sub.Tensor", 0, number, kind) for number in (1, 2, 3, 4)),
            ("_softmax.default", 0, {"number": -1}, False, kind), ("sum.dim_IntList", 9, [1], True, kind),
            ("div.Tensor", 9, 10, kind),
            results=tuple(range(1, 12)),
        )  # fmt: skip
        cases.append(group(f"{dtype} {width}", text, (torch.randn(9, width) - 2).to(getattr(torch, dtype))))
    check_cases(cases, core=("float32 100",))


def _assert_same(case: Group, actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted), case.name


INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")


def test_integers_and_truth_are_bit_exact(kernel_store: ArtifactStore) -> None:
    cases = []
    torch.manual_seed(0)
    for dtype in INTEGERS:
        low, high = {"bool": (0, 2), "uint8": (0, 256), "int8": (-128, 128)}.get(dtype, (-30000, 30000))
        a, b = (torch.randint(low, high, (3, 45)).to(getattr(torch, dtype)) for _ in range(2))
        same, truth, wide, real = typed(dtype), typed("bool"), typed("int64"), typed("bfloat16")
        instructions: list[tuple[Any, ...]] = [
            ("add.Tensor", 0, 1, same), ("mul.Tensor", 0, 1, same), ("maximum.default", 0, 1, same),
            ("bitwise_xor.Tensor", 0, 1, same), ("bitwise_not.default", 0, same),
            ("lt.Tensor", 0, 1, truth), ("logical_not.default", 0, truth), ("logical_or.default", 7, 8, truth),
            ("where.self", 7, 0, 1, same), ("_to_copy.default", 0, typed("int64", dtype={"dtype": "int64"})),
            ("mul.Tensor", 11, 1, wide), ("sum.dim_IntList", 0, [-1], True, wide), ("sub.Tensor", 12, 13, wide),
            ("_to_copy.default", 0, typed("bfloat16", dtype={"dtype": "bfloat16"})), ("mul.Tensor", 15, 1, real),
            ("ge.Scalar", 0, {"number": 1}, truth),
        ]  # fmt: skip
        if dtype != "bool":
            instructions += [("neg.default", 0, same), ("abs.default", 0, same), ("sub.Tensor", 0, 1, same)]
        count = len(instructions)
        cases.append(group(dtype, program(2, *instructions, results=tuple(range(2, 2 + count))), a, b))
    for case, actual, expected in run(cases, kernel_store):
        _assert_same(case, actual, expected)


def test_masks_and_comparisons_of_floats_are_bit_exact(kernel_store: ArtifactStore) -> None:
    truth, cases = typed("bool"), []
    torch.manual_seed(0)
    for dtype in ("float32", "bfloat16"):
        same, whole = typed(dtype), typed("int64", dtype={"dtype": "int64"})
        text = program(
            2,
            ("gt.Scalar", 0, 0.1, truth), ("ge.Tensor", 1, 0, truth), ("logical_and.default", 2, 3, truth),
            ("logical_not.default", 4, truth), ("where.self", 5, 0, 1, same),
            ("masked_fill.Scalar", 6, 4, {"f": "-inf"}, same), ("mul.Scalar", 0, 9.5, same),
            ("_to_copy.default", 8, whole), ("mul.Tensor", 9, 9, typed("int64")), ("eq.Tensor", 0, 1, truth),
            ("abs.default", 0, same), ("full_like.default", 0, -2.5, same), ("maximum.default", 0, 1, same),
            ("clamp.default", 0, -0.3, 0.3, same),
            results=tuple(range(2, 16)),
        )  # fmt: skip
        a, b = (torch.randn(4, 30).to(getattr(torch, dtype)) for _ in range(2))
        # The same number in both, NaN, a signed zero, and a bf16 that equals the rounded threshold alone.
        b[0, :8] = a[0, :8]
        a[1, :4] = torch.tensor([float("nan"), -0.0, 0.1, float("inf")])
        case = group(dtype, text, a, b)
        cases.append(case)
    for case, actual, expected in run(cases, kernel_store):
        for number, (got, wanted) in enumerate(zip(actual, expected, strict=True), start=2):
            if number == 9 or number == 10:  # integers of NaN and infinity are not defined
                got, wanted = got[2:], wanted[2:]
            assert torch.equal(torch.nan_to_num(got, 7.0), torch.nan_to_num(wanted, 7.0)), (case.name, number)
            assert torch.equal(got != got, wanted != wanted), (case.name, number)


def test_bf16_is_rounded_after_every_op_and_fp32_is_not_fused(kernel_store: ArtifactStore) -> None:
    cases = []
    torch.manual_seed(0)
    for dtype in ("float32", "bfloat16"):
        same = typed(dtype)
        text = program(2, ("mul.Tensor", 0, 1, same), ("add.Tensor", 2, 0, same), ("mul.Tensor", 3, 0.1, same),
                       ("sub.Tensor", 4, 2, same))  # fmt: skip
        inputs = (torch.randn(7, 200).to(getattr(torch, dtype)) for _ in range(2))
        cases.append(group(dtype, text, *inputs))
    for case, actual, expected in run(cases, kernel_store):
        _assert_same(case, actual, expected)


def test_each_op_alone(check_cases) -> None:
    instructions: list[tuple[Any, ...]] = [
        *((f"{op}.default", 0) for op in ("exp", "exp2", "sqrt", "rsqrt", "reciprocal", "log", "log2", "sin", "cos")),
        *((f"{op}.default", 0) for op in ("erf", "floor", "ceil", "neg", "abs", "relu", "silu", "square", "sigmoid")),
        *((f"{op}.default", 0) for op in ("tanh", "expm1", "gelu", "clone", "zeros_like", "ones_like")),
        *(("pow.Tensor_Scalar", 0, exponent) for exponent in (2.0, 3.0, 0.5, -0.5, -1.0)),
        ("gelu.default", 0, {"approximate": "tanh"}),
        ("clamp_min.default", 0, 0.5), ("clamp_max.default", 0, 0.5), ("rsub.Scalar", 0, 1.0), ("div.Scalar", 0, 3.0),
    ]  # fmt: skip
    text = program(1, *instructions, results=tuple(range(1, 1 + len(instructions))))
    cases = [group("each", text, torch.rand(3, 50) * 2 + 0.1)]
    far = torch.cat([torch.logspace(-6, 3, 60), -torch.logspace(-6, 3, 60)]).reshape(3, 40)
    softcap = program(1, ("div.Tensor", 0, 30.0), ("tanh.default", 1), ("mul.Tensor", 2, 30.0))
    check_cases([*cases, group("soft cap", softcap, far)], core=("soft cap", "each"))


def test_functions_hold_at_the_ends_of_their_range(kernel_store: ArtifactStore) -> None:
    ends = torch.tensor([[0.0, -0.0, 1e-30, -1e-5, 1e-5, 20.0, 88.6, 89.0, 1e30, float("inf"), float("nan")]])
    names = ("exp", "tanh", "expm1", "sigmoid", "silu", "relu", "erf")
    text = program(1, *((f"{name}.default", 0) for name in names), results=tuple(range(1, 1 + len(names))))
    ((_, actual, expected),) = run([group("ends", text, torch.cat([ends, -ends]))], kernel_store)
    for name, got, wanted in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=1e-6, atol=1e-36, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


BINARY = ("add.Tensor", "sub.Tensor", "mul.Tensor", "maximum.default", "minimum.default")
UNARY = ("sigmoid.default", "tanh.default", "neg.default", "relu.default", "cos.default", "abs.default")
ROWWISE = ("amax.default", "sum.dim_IntList", "_softmax.default")


@st.composite
def programs(draw: st.DrawFn) -> tuple[str, str, int, int, int]:
    """A program on ``[T, D]``, ``[D]`` and ``[T, 1]``, its dtype, T, D and a seed."""
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    same = typed(dtype)
    instructions: list[tuple[Any, ...]] = []
    for count in range(draw(st.integers(1, 8))):
        value = st.integers(0, 2 + count)
        shape = draw(st.sampled_from(["binary", "binary", "unary", "rows"]))
        if shape == "binary":
            instructions.append((draw(st.sampled_from(BINARY)), draw(value), draw(value), same))
        elif shape == "unary":
            instructions.append((draw(st.sampled_from(UNARY)), draw(value), same))
        else:
            op = draw(st.sampled_from(ROWWISE))
            rest: tuple[Any, ...] = ({"number": -1}, False) if op.startswith("_softmax") else ([-1], True)
            instructions.append((op, 0, *rest, same))
    instructions.append(("add.Tensor", 0, 2 + len(instructions), same))  # the result has the group's shape
    text = program(3, *instructions)
    return text, dtype, draw(st.integers(1, 40)), draw(st.integers(2, 70)), draw(st.integers(0, 99))


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(programs(), min_size=8, max_size=8))
def test_any_program_gives_what_its_calls_give_one_by_one(
    kernel_store: ArtifactStore, made: list[tuple[str, str, int, int, int]]
) -> None:
    cases = []
    for text, dtype, tokens, width, seed in made:
        torch.manual_seed(seed)
        shapes = ((tokens, width), (width,), (tokens, 1))
        cases.append(group(dtype, text, *((torch.rand(s) + 0.5).to(getattr(torch, dtype)) for s in shapes)))
    for case, actual, expected in run(cases, kernel_store):
        tolerance = 4e-2 if case.name == "bfloat16" else 1e-4
        scale = max(1.0, expected[0].float().abs().max().item())
        torch.testing.assert_close(actual[0].float(), expected[0].float(), rtol=tolerance, atol=tolerance * scale)


def test_a_row_does_not_depend_on_the_rows_beside_it(kernel_store: ArtifactStore) -> None:
    text = program(2, ("_softmax.default", 0, {"number": -1}, False), ("mul.Tensor", 2, 1), ("tanh.default", 3))
    x, scale = torch.randn(64, 300), torch.randn(300)
    whole, one = (group("rows", text, rows, scale) for rows in (x, x[63:]))
    (_, all_rows, _), (_, last_row, _) = run([whole, one], kernel_store)
    assert torch.equal(all_rows[0][63:], last_row[0])


def test_every_op_that_groups_may_hold_has_a_cpp_form() -> None:
    from graphserve.kernels.cpu import aten_text

    assert aten_text.SUPPORTED >= GROUP_OPS | ROW_OPS


def refusal(
    text: str, *shapes: tuple[int | str, ...], dtype: str = "float32", out: tuple[int | str, ...] = ("T", 8)
) -> str:
    specs = [ArgSpec(dtype, shape) for shape in shapes]
    result = generate("pointwise", {"program": text}, specs, [ArgSpec(dtype, out)], "generic")
    assert isinstance(result, Refusal), result
    return result.reason


def test_what_a_group_cannot_hold_is_refused_by_name() -> None:
    rows = ("T", 8)
    assert "aten.cumsum.default" in refusal(program(1, ("cumsum.default", 0, [-1])), rows)
    assert "powers" in refusal(program(1, ("pow.Tensor_Scalar", 0, 1.7)), rows)
    assert "reductions" in refusal(program(1, ("sum.dim_IntList", 0, [0], True)), rows)
    assert "broadcast" in refusal(program(2, ("add.Tensor", 0, 1)), rows, ("T", 9))
    assert "one value a row" in refusal(program(2, ("mul.Tensor", 1, 1.0)), rows, (8,), out=(8,))
    assert "differs by column" in refusal(program(1, ("neg.default", 0)), rows, out=("T", 1))
    assert "float64" in refusal(program(1, ("neg.default", 0)), rows, dtype="float64")
    assert "float16" in refusal(program(1, ("neg.default", 0, typed("float16"))), rows)
