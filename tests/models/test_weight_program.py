"""Weight program expressions: shape and value equal plain torch, for random trees; programs survive JSON."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphserve.models.weight_program import (
    Concat,
    Expression,
    Load,
    ParameterRule,
    Reshape,
    ShapeError,
    Slice,
    Stack,
    Transpose,
    WeightProgram,
    evaluate,
    shape_of,
    tensors_of,
)


class Memory:
    """A reader over tensors in memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, shape: tuple[int, ...]) -> Load:
        name = f"t{len(self.tensors)}"
        count = sum(tensor.numel() for tensor in self.tensors.values())
        values = torch.arange(count, count + int(torch.tensor(shape).prod()), dtype=torch.float32)
        self.tensors[name] = values.reshape(shape)
        return Load(name)

    def read(self, name: str, first_row: int = 0, num_rows: int | None = None) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor.clone() if num_rows is None else tensor[first_row : first_row + num_rows].clone()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def plain(expression: Expression, memory: Memory) -> torch.Tensor:
    """The same value by ordinary torch functions."""
    match expression:
        case Load(tensor):
            return memory.tensors[tensor]
        case Stack(inputs, dim):
            return torch.stack([plain(part, memory) for part in inputs], dim)
        case Concat(inputs, dim):
            return torch.cat([plain(part, memory) for part in inputs], dim)
        case Slice(part, dim, start, length):
            return plain(part, memory).narrow(dim, start, length)
        case Transpose(part, dim0, dim1):
            return plain(part, memory).transpose(dim0, dim1)
        case Reshape(part, shape):
            return plain(part, memory).reshape(shape)


@st.composite
def trees(draw: st.DrawFn, memory: Memory, shape: tuple[int, ...], depth: int) -> Expression:
    """A random expression of the given shape."""
    kinds = ["load"] if depth == 0 else ["load", "stack", "concat", "slice", "transpose", "reshape"]
    kind = draw(st.sampled_from(kinds))
    dim = draw(st.integers(0, len(shape) - 1))
    below = lambda inner: draw(trees(memory, inner, depth - 1))  # noqa: E731
    if kind == "stack" and shape[dim] <= 3 and len(shape) > 1:
        return Stack(tuple(below(shape[:dim] + shape[dim + 1 :]) for _ in range(shape[dim])), dim)
    if kind == "concat" and shape[dim] > 1:
        first = draw(st.integers(1, shape[dim] - 1))
        parts = [(*shape[:dim], length, *shape[dim + 1 :]) for length in (first, shape[dim] - first)]
        return Concat(tuple(below(part) for part in parts), dim)
    if kind == "slice":
        start, rest = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        inner = (*shape[:dim], start + shape[dim] + rest, *shape[dim + 1 :])
        return Slice(below(inner), dim, start, shape[dim])
    if kind == "transpose":
        other = draw(st.integers(0, len(shape) - 1))
        swapped = list(shape)
        swapped[dim], swapped[other] = swapped[other], swapped[dim]
        return Transpose(below(tuple(swapped)), dim, other)
    if kind == "reshape":
        return Reshape(below(draw(st.sampled_from([shape[::-1], (int(torch.tensor(shape).prod()),)]))), shape)
    return memory.add(shape)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
def test_any_tree_has_the_shape_and_value_that_torch_gives(data: st.DataObject, shape: tuple[int, ...]) -> None:
    memory = Memory()
    tree = data.draw(trees(memory, shape, 4))
    expected = plain(tree, memory)
    assert shape_of(tree, memory.shapes) == shape
    found = evaluate(ParameterRule(tree, shape, "float32"), memory, memory.shapes)
    assert found.is_contiguous() and torch.equal(found, expected)
    decoded = msgspec.json.decode(msgspec.json.encode(tree), type=Expression)
    assert decoded == tree
    assert set(tensors_of(tree)) <= memory.tensors.keys()


def test_values_are_rounded_to_the_parameter_dtype() -> None:
    memory = Memory()
    load = memory.add((2, 2))
    memory.tensors["t0"] += 1.0 / 3.0
    for value in (load, Stack((load, load), 0)):
        found = evaluate(ParameterRule(value, shape_of(value, memory.shapes), "bfloat16"), memory, memory.shapes)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, plain(value, memory).to(torch.bfloat16))


MISFITS = [
    (lambda a, b: Stack((a, b), 0), r"t1 expected shape \[2, 3\] like t0, found \[2, 4\]"),
    (lambda a, b: Concat((a, b), 0), r"t1 expected shape \[2, 3\] like t0, found \[2, 4\]"),
    (lambda a, b: Concat((a,), 2), r"t0 expected 3 or more dimensions, found \[2, 3\]"),
    (lambda a, b: Slice(a, 1, 2, 2), r"t0 expected 4 or more in dimension 1, found \[2, 3\]"),
    (lambda a, b: Transpose(a, 0, 2), r"t0 expected 3 or more dimensions, found \[2, 3\]"),
    (lambda a, b: Reshape(a, (5,)), r"t0 expected 5 values, found \[2, 3\]"),
]


@pytest.mark.parametrize(("make", "message"), MISFITS)
def test_an_operation_that_does_not_fit_names_the_tensor(make, message: str) -> None:
    memory = Memory()
    tree = make(memory.add((2, 3)), memory.add((2, 4)))
    with pytest.raises(ShapeError, match=message):
        shape_of(tree, memory.shapes)


def test_a_program_survives_json_and_counts_its_bytes() -> None:
    rules = {
        "a": ParameterRule(Stack((Load("x"), Load("y")), 0), (2, 3), "bfloat16"),
        "b": ParameterRule(Load("z"), (4,), "float32"),
    }
    program = WeightProgram(rules=rules, aliases={"c": "b"})
    decoded = msgspec.json.decode(msgspec.json.encode(program), type=WeightProgram)
    assert decoded == program and list(decoded.rules) == ["a", "b"]
    assert program.num_bytes == 2 * 3 * 2 + 4 * 4
