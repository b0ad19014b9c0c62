"""How a launch's tensors look to a kernel generator: dtype, shape and strides, partly known when a kernel is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

Dim = int | str

ITEM_SIZES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


class Refused(Exception):
    """A generator cannot express its arguments; the ``generate`` functions return it as a :class:`Refusal`."""


class Refusal(msgspec.Struct, frozen=True):
    """Why no kernel was generated; the launch stays with its reference."""

    reason: str


class ArgSpec(msgspec.Struct, frozen=True):
    """One tensor argument.

    ``shape`` and ``strides`` hold ints and affine strings in T, R, S and B_g (``"T"``, ``"4*T"``); ``strides`` count
    elements, None means contiguous. ``alignment``: its first element lies at a multiple of so many bytes.
    """

    dtype: str
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...] | None = None
    alignment: int = 16

    def int_dim(self, axis: int) -> int:
        """A dimension that must be known when the kernel is generated."""
        size = self.shape[axis]
        if not isinstance(size, int):
            raise Refused(f"dimension {axis} of shape {self.shape} must be a constant")
        return size

    def stride(self, axis: int) -> Dim:
        """Stride of one dimension in elements, computed for a contiguous tensor where none is given."""
        if self.strides is not None:
            return self.strides[axis]
        return product(self.shape[axis % len(self.shape) + 1 :])

    @property
    def is_contiguous(self) -> bool:
        """Whether elements lie in order without gaps."""
        return self.strides is None or self.strides == tuple(
            product(self.shape[i + 1 :]) for i in range(len(self.shape))
        )

    def int_stride(self, axis: int) -> int:
        """A stride that must be known when the kernel is generated."""
        stride = self.stride(axis)
        if not isinstance(stride, int):
            raise Refused(f"stride {axis} of shape {self.shape} must be a constant, got {stride!r}")
        return stride


@dataclass(frozen=True)
class Call:
    """One launch to generate: op name without ``gs.``, attributes by name, tensor arguments and outputs."""

    op: str
    attrs: dict[str, Any]
    args: list[ArgSpec | None]
    outputs: list[ArgSpec]

    def tensor(self, index: int, name: str) -> ArgSpec:
        """Tensor argument ``index``, which must be present."""
        if index >= len(self.args) or self.args[index] is None:
            raise Refused(f"{self.op} needs {name} (argument {index})")
        spec = self.args[index]
        assert spec is not None
        return spec

    def optional(self, index: int) -> ArgSpec | None:
        """Tensor argument ``index`` or None."""
        return self.args[index] if index < len(self.args) else None

    def attr(self, name: str) -> Any:
        """An attribute, which must be given."""
        if name not in self.attrs:
            raise Refused(f"{self.op} needs the attribute {name!r}; given: {', '.join(self.attrs) or 'none'}")
        return self.attrs[name]


@dataclass(frozen=True)
class RowLayout:
    """Leading dimensions of a tensor as one list of rows.

    Row ``r`` starts at element ``(r // inner) * outer_stride + (r % inner) * inner_stride``. With ``inner == 1`` it
    is ``r * outer_stride``.
    """

    count: Dim
    inner: int
    outer_stride: int
    inner_stride: int


def product(dims: tuple[Dim, ...]) -> Dim:
    """Product of dimensions, an int where all are ints."""
    number = 1
    symbols: list[str] = []
    for dim in dims:
        if isinstance(dim, int):
            number *= dim
        else:
            symbols.append(dim if dim.isidentifier() else f"({dim})")
    if not symbols:
        return number
    return "*".join(symbols + ([str(number)] if number != 1 else []))


def row_layout(spec: ArgSpec, trailing: int = 1) -> RowLayout:
    """View all but the last ``trailing`` dimensions as rows with at most two strides.

    Raises:
        Refused: the leading dimensions need more than two strides, or one with an unknown size is not outermost.
    """
    leading = tuple(size for size in spec.shape[: len(spec.shape) - trailing] if size != 1)
    if spec.strides is None and any(isinstance(size, str) for size in leading[1:]):
        # [B, T, H] in one piece: the batch's stride varies with T, but the rows lie end to end.
        return RowLayout(product(leading), 1, spec.int_stride(-trailing - 1), 0)
    merged: list[tuple[Dim, int]] = []  # (size, stride), outermost first
    for axis in range(len(spec.shape) - trailing):
        size = spec.shape[axis]
        if size == 1:
            continue
        stride = spec.int_stride(axis)
        if merged and isinstance(size, int) and merged[-1][1] == size * stride:
            outer = merged[-1][0]
            merged[-1] = (outer * size if isinstance(outer, int) else product((outer, size)), stride)
        else:
            merged.append((size, stride))
    count = product(tuple(size for size, _ in merged))
    if not merged:
        return RowLayout(1, 1, 0, 0)
    if len(merged) == 1:
        return RowLayout(count, 1, merged[0][1], 0)
    inner, inner_stride = merged[1]
    if len(merged) > 2 or not isinstance(inner, int):
        raise Refused(f"shape {spec.shape} with strides {spec.strides} is not a list of rows with two strides")
    return RowLayout(count, inner, merged[0][1], inner_stride)


def require_unit_stride(spec: ArgSpec, name: str) -> None:
    """Refuse a tensor whose last dimension is not contiguous."""
    if spec.shape[-1] != 1 and spec.stride(-1) != 1:
        raise Refused(f"{name} must be contiguous in its last dimension, got strides {spec.strides}")
