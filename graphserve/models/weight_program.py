"""The weight program: for every parameter of a model, the checkpoint tensors and operations that make it.

A program is data (JSON through msgspec) and needs neither transformers nor the model to run, so a plan can carry it.
An expression is a tree of six operations over stored tensors; all of them move values without changing them, so a
tree can be evaluated straight into the parameter's own memory, and its shape follows from the file headers alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

_ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


class Load(msgspec.Struct, frozen=True, tag="load"):
    """A tensor of the checkpoint."""

    tensor: str


class Stack(msgspec.Struct, frozen=True, tag="stack"):
    """Equal shapes joined along a new dimension ``dim`` (>= 0)."""

    inputs: tuple[Expression, ...]
    dim: int


class Concat(msgspec.Struct, frozen=True, tag="concat"):
    """Shapes that differ in ``dim`` (>= 0) only, joined along it."""

    inputs: tuple[Expression, ...]
    dim: int


class Slice(msgspec.Struct, frozen=True, tag="slice"):
    """``input[..., start : start + length, ...]`` along ``dim`` (>= 0)."""

    input: Expression
    dim: int
    start: int
    length: int


class Transpose(msgspec.Struct, frozen=True, tag="transpose"):
    """Two dimensions (>= 0) exchanged."""

    input: Expression
    dim0: int
    dim1: int


class Reshape(msgspec.Struct, frozen=True, tag="reshape"):
    """The same values in row-major order under another shape."""

    input: Expression
    shape: Shape


Expression = Load | Stack | Concat | Slice | Transpose | Reshape


class ParameterRule(msgspec.Struct, frozen=True):
    """How one parameter is made. ``dtype`` is the parameter's, which stored values are rounded to."""

    value: Expression
    shape: Shape
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameter."""
        return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 1)


class WeightProgram(msgspec.Struct, frozen=True):
    """Rules by parameter name, and further names of tied parameters.

    ``stored_twice`` has a rule for every further name that is in the checkpoint as well. Only the values say whether
    it is the parameter that the model ties it to; where it is not, the program is :meth:`untied` of it.

    Invariant: ``aliases`` values are keys of ``rules``; a name is in one of the two, never in both; the keys of
    ``stored_twice`` are in ``aliases``.
    """

    rules: dict[str, ParameterRule]
    aliases: dict[str, str] = {}
    stored_twice: dict[str, ParameterRule] = {}

    def untied(self, names: Collection[str]) -> WeightProgram:
        """The program in which some of ``stored_twice`` are parameters of their own."""
        return WeightProgram(
            rules={**self.rules, **{name: self.stored_twice[name] for name in names}},
            aliases={name: first for name, first in self.aliases.items() if name not in names},
            stored_twice={name: rule for name, rule in self.stored_twice.items() if name not in names},
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters, tied ones counted once."""
        return sum(rule.num_bytes for rule in self.rules.values())


class TensorReader(Protocol):
    """Where the tensors come from; ``checkpoint.Checkpoint`` is one."""

    def read(self, name: str, first_row: int = 0, num_rows: int | None = None) -> torch.Tensor: ...


class ShapeError(ValueError):
    """An expression does not fit the stored shapes; the message names tensor, expected and found."""


def tensors_of(expression: Expression) -> Iterator[str]:
    """Names of the stored tensors an expression reads, left to right."""
    match expression:
        case Load(tensor):
            yield tensor
        case Stack(inputs) | Concat(inputs):
            for part in inputs:
                yield from tensors_of(part)
        case Slice() | Transpose() | Reshape():
            yield from tensors_of(expression.input)


def shape_of(expression: Expression, shapes: Mapping[str, Shape]) -> Shape:
    """Shape of an expression's value, from the stored shapes.

    Raises:
        ShapeError: an operation cannot be applied to them.
    """
    match expression:
        case Load(tensor):
            return tuple(shapes[tensor])
        case Stack(inputs, dim):
            first = shape_of(inputs[0], shapes)
            _check_equal(expression, shapes, first, except_dim=None)
            return (*first[:dim], len(inputs), *first[dim:])
        case Concat(inputs, dim):
            first = shape_of(inputs[0], shapes)
            if dim >= len(first):
                raise ShapeError(
                    f"tensor {_first(inputs[0])} expected {dim + 1} or more dimensions, found {list(first)}"
                )
            _check_equal(expression, shapes, first, except_dim=dim)
            return (*first[:dim], sum(shape_of(part, shapes)[dim] for part in inputs), *first[dim + 1 :])
        case Slice(part, dim, start, length):
            shape = shape_of(part, shapes)
            if dim >= len(shape) or start + length > shape[dim]:
                raise ShapeError(
                    f"tensor {_first(part)} expected {start + length} or more in dimension {dim}, found {list(shape)}"
                )
            return (*shape[:dim], length, *shape[dim + 1 :])
        case Transpose(part, dim0, dim1):
            shape = shape_of(part, shapes)
            if max(dim0, dim1) >= len(shape):
                raise ShapeError(
                    f"tensor {_first(part)} expected {max(dim0, dim1) + 1} or more dimensions, found {list(shape)}"
                )
            swapped = list(shape)
            swapped[dim0], swapped[dim1] = swapped[dim1], swapped[dim0]
            return tuple(swapped)
        case Reshape(part, shape):
            found = shape_of(part, shapes)
            if math.prod(found) != math.prod(shape):
                raise ShapeError(f"tensor {_first(part)} expected {math.prod(shape)} values, found {list(found)}")
            return shape


def evaluate(rule: ParameterRule, reader: TensorReader, shapes: Mapping[str, Shape]) -> torch.Tensor:
    """Make one parameter: a new contiguous CPU tensor ``rule.shape`` of ``rule.dtype``.

    Cost: reads each stored byte once (a slice of rows reads its rows only); the peak beyond the result is one stored
    tensor.
    """
    import torch

    dtype = getattr(torch, rule.dtype)
    if isinstance(rule.value, Load):
        # The read already is a fresh copy; a cast makes the only other one.
        return reader.read(rule.value.tensor).to(dtype)
    out = torch.empty(rule.shape, dtype=dtype)
    _write(rule.value, out, reader, shapes)
    return out


def _write(expression: Expression, out: torch.Tensor, reader: TensorReader, shapes: Mapping[str, Shape]) -> None:
    """Write an expression's value into ``out``, a view of its shape (any strides)."""
    match expression:
        case Load(tensor):
            out.copy_(reader.read(tensor))
        case Stack(inputs, dim):
            for index, part in enumerate(inputs):
                _write(part, out.select(dim, index), reader, shapes)
        case Concat(inputs, dim):
            start = 0
            for part in inputs:
                length = shape_of(part, shapes)[dim]
                _write(part, out.narrow(dim, start, length), reader, shapes)
                start += length
        case Slice(Load(tensor), 0, start, length):
            out.copy_(reader.read(tensor, first_row=start, num_rows=length))
        case Slice(part, dim, start, length):
            whole = out.new_empty(shape_of(part, shapes))
            _write(part, whole, reader, shapes)
            out.copy_(whole.narrow(dim, start, length))
        case Transpose(part, dim0, dim1):
            _write(part, out.transpose(dim0, dim1), reader, shapes)
        case Reshape(part, shape):
            inner = shape_of(part, shapes)
            if out.is_contiguous():
                _write(part, out.view(inner), reader, shapes)
            else:
                whole = out.new_empty(inner)
                _write(part, whole, reader, shapes)
                out.copy_(whole.view(shape))


def _first(expression: Expression) -> str:
    return next(tensors_of(expression))


def _check_equal(joined: Stack | Concat, shapes: Mapping[str, Shape], first: Shape, except_dim: int | None) -> None:
    for part in joined.inputs[1:]:
        found = shape_of(part, shapes)
        same = len(found) == len(first) and all(
            a == b for dim, (a, b) in enumerate(zip(found, first, strict=True)) if dim != except_dim
        )
        if not same:
            raise ShapeError(
                f"tensor {_first(part)} expected shape {list(first)} like {_first(joined.inputs[0])}, "
                f"found {list(found)}"
            )
