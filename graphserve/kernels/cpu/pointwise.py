"""``pointwise``: a group of elementwise ops, and of reductions over rows, in one pass over its tensors.

A reduction is a loop of its own over the row, which computes again what it reads; what depends on no column is computed
once a row.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphserve.kernels.arg_spec import ArgSpec, Call, Dim, Refused, product
from graphserve.kernels.cpu import aten_text
from graphserve.kernels.cpu.entries import Entry
from graphserve.kernels.cpu.kernel import NUM_THREADS, cpp_dim
from graphserve.kernels.cpu.pointwise_expressions import Value, as_held, expression_of, packet_of
from graphserve.kernels.pointwise_program import Instruction, PointwiseProgram, is_value

# Columns of one piece of work where rows need not be whole: a few KiB, so that one long row still has many.
TILE = 4096
FAMILIES = ("activation", "pointwise")


@dataclass(frozen=True)
class _Axis:
    """One loop of the group: its size and the stride of each tensor, 0 where a tensor repeats."""

    size: Dim
    strides: tuple[Dim, ...]


def pointwise(call: Call) -> Entry:
    """The group's inputs broadcast to one shape; results have this shape, or are one value a row of it."""
    program = PointwiseProgram.decode(call.attr("program"))
    inputs = [call.tensor(i, "input") for i in range(program.num_inputs)]
    specs = [*inputs, *call.outputs]
    dtypes = [spec.dtype for spec in specs] + [i.dtype for i in program.instructions]
    for dtype in dtypes:
        if dtype not in aten_text.STORAGE:
            raise Refused(f"a group with {dtype} has no C++ form: only {', '.join(aten_text.STORAGE)}")
    packets = [packet_of(i) for i in program.instructions]
    whole_rows = any(p in aten_text.REDUCTIONS or p in aten_text.SOFTMAX for p in packets)
    shape = _broadcast(specs)
    for spec in call.outputs:
        if spec.shape not in (shape, (*shape[:-1], 1)):
            raise Refused(
                f"a result of shape {list(spec.shape)} in a group of shape {list(shape)}: it must have the group's "
                "shape or one value a row"
            )
    axes = _axes(specs, shape, whole_rows)
    group = _Group(axes[-1], whole_rows)
    for i, spec in enumerate(inputs):
        group.load(i, spec)
    for instruction, packet in zip(program.instructions, packets, strict=True):
        group.add(instruction, packet)
    for i, (number, spec) in enumerate(zip(program.results, call.outputs, strict=True), start=len(inputs)):
        group.store(i, number, spec)
    notes = [f"  // {line}" for line in program.lines()]
    places = [(number, 0) for number in range(len(specs))]
    return Entry(FAMILIES, "\n".join([*notes, *_over_rows(axes, specs, places, len(inputs), group)]))


def copy(source: ArgSpec, source_at: int, out: ArgSpec, out_at: int, offset: Dim) -> list[str]:
    """Statements that copy tensor ``source_at`` of a kernel to tensor ``out_at``, ``offset`` elements in.

    ``out`` is the part that is written, with the strides of the whole.
    """
    specs = [source, out]
    axes = _axes(specs, out.shape, whole_rows=False)
    group = _Group(axes[-1], whole_rows=False)
    group.load(0, source)
    group.store(1, 0, out)
    return _over_rows(axes, specs, [(source_at, 0), (out_at, offset)], 1, group)


def _broadcast(specs: list[ArgSpec]) -> tuple[Dim, ...]:
    rank = max(1, *(len(spec.shape) for spec in specs))
    shape: list[Dim] = [1] * rank
    for spec in specs:
        for axis, size in enumerate(spec.shape, start=rank - len(spec.shape)):
            if shape[axis] == 1:
                shape[axis] = size
            elif size not in (1, shape[axis]):
                raise Refused(f"shapes {[list(s.shape) for s in specs]} do not broadcast to one")
    return tuple(shape)


def _axes(specs: list[ArgSpec], shape: tuple[Dim, ...], whole_rows: bool) -> list[_Axis]:
    """The loops over ``shape``, outermost first, as few as the strides allow; the last one is over columns."""
    last = len(shape) - 1
    axes: list[_Axis] = []
    for at, size in enumerate(shape):
        axis = _Axis(size, tuple(_stride(spec, at - len(shape)) for spec in specs))
        is_row = whole_rows and at == last
        if size == 1 and not is_row:
            continue
        if axes and not is_row and all(
            _factors(outer) == _factors(product((size, inner)))
            for outer, inner in zip(axes[-1].strides, axis.strides, strict=True)
        ):  # fmt: skip
            axes[-1] = _Axis(product((axes[-1].size, size)), axis.strides)
        else:
            axes.append(axis)
    return axes or [_Axis(1, (0,) * len(specs))]


def _stride(spec: ArgSpec, axis: int) -> Dim:
    """Stride of a dimension counted from the end, 0 where the tensor has one element for many."""
    return 0 if -axis > len(spec.shape) or spec.shape[axis] == 1 else spec.stride(axis)


def _factors(dim: Dim) -> list[str]:
    """A canonical form of a product: ``"4*T"`` and ``"T*2*2"`` are equal. Other expressions equal only themselves."""
    number, symbols = 1, []
    for factor in str(dim).replace("(", "").replace(")", "").split("*") if _is_product(dim) else [str(dim)]:
        if factor.strip().isdigit():
            number *= int(factor)
        else:
            symbols.append(factor.strip())
    return [str(number), *sorted(symbols)] if number else ["0"]


def _is_product(dim: Dim) -> bool:
    return not any(sign in str(dim) for sign in "+-/")


def _over_rows(
    axes: list[_Axis], specs: list[ArgSpec], places: Sequence[tuple[int, Dim]], num_inputs: int, group: _Group
) -> list[str]:
    """The loops around the group's statements. ``places``: each tensor's pointer argument and its first element."""
    sizes = [cpp_dim(axis.size) for axis in axes]
    tile = "columns" if group.whole_rows else f"int64_t({TILE})"
    lines = [
        f"  const int64_t rows = {' * '.join(sizes[:-1]) or '1'}, columns = {sizes[-1]};",
        f"  const int64_t tile = {tile}, tiles = columns > 0 ? (columns + tile - 1) / tile : 0;",
        "  const int64_t grain = 16384 / ((columns < tile ? columns : tile) + 1) + 1;",
        f"  parallel_for({NUM_THREADS}, rows * tiles, grain, [&](int64_t begin, int64_t end) {{",
        "    for (int64_t item = begin; item < end; ++item) {",
        "      const int64_t first = item % tiles * tile, last = first + tile < columns ? first + tile : columns;",
    ]
    rest = "item / tiles"
    indices = []
    for at in reversed(range(len(axes) - 1)):
        divided = f"({rest}) / {sizes[at]}"
        indices.append(f"      const int64_t i{at} = {rest if at == 0 else f'({rest}) % {sizes[at]}'};")
        rest = divided
    lines += indices
    for number, spec in enumerate(specs):
        storage = aten_text.STORAGE[spec.dtype][0]
        qualified = f"const {storage}" if number < num_inputs else storage
        moves = "".join(
            f" + i{at} * {cpp_dim(axis.strides[number])}"
            for at, axis in enumerate(axes[:-1])
            if axis.strides[number] != 0
        )
        at, offset = places[number]
        start = f" + {cpp_dim(offset)}" if offset != 0 else ""
        lines.append(f"      {qualified}* t{number} = static_cast<{qualified}*>(p[{at}]){start}{moves};")
    return [*lines, *(textwrap.indent(line, " " * 6) for line in group.lines()), "    }", "  });"]


class _Group:
    """Statements of a group over one row.

    Args:
        columns: the loop over the row.
        whole_rows: whether the group reduces rows.
    """

    def __init__(self, columns: _Axis, whole_rows: bool) -> None:
        self.whole_rows = whole_rows
        self._columns = columns
        self._values: list[Value] = []
        self._row: list[str] = []  # statements once a row, loops of reductions among them
        self._stores: list[tuple[int, str]] = []
        self._num_reductions = 0

    def lines(self) -> list[str]:
        """All statements; those in the loop over columns are the ones that its stores need."""
        if not self._stores:
            return self._row
        return [*self._row, *self._loop([number for number, _ in self._stores], [line for _, line in self._stores])]

    def load(self, tensor: int, spec: ArgSpec) -> None:
        """An input becomes the next value."""
        storage, kind = aten_text.STORAGE[spec.dtype]
        stride, name, vector = self._columns.strides[tensor], f"v{tensor}", aten_text.VECTORS[kind]
        has_columns = stride != 0
        step, place = cpp_dim(stride), f"t{tensor}" if stride == 0 else f"t{tensor} + i * {cpp_dim(stride)}"
        if not has_columns and kind == "f":
            expression = f"set1(to_float(*{place}))"
        elif not has_columns:
            expression = {"i": "set1i(*{})", "l": "set1l(*{})", "b": "set1i(*{} ? -1 : 0)"}[kind].format(place)
        elif kind == "f":
            expression = f"load_lanes({place}, lanes)" if stride == 1 else f"load_strided({place}, {step}, lanes)"
        else:
            expression = f"load_ints<{vector}>({place}, {step}, lanes)" + (" != 0" if kind == "b" else "")
        statement = f"const {vector} {name} = {expression};"
        if not has_columns:
            self._row.append(statement)
        self._values.append(Value(name, spec.dtype, len(spec.shape), has_columns, statement))

    def add(self, instruction: Instruction, packet: str) -> None:
        """The result of an instruction becomes the next value."""
        operands = [a["v"] for a in (*instruction.args, *instruction.kwargs.values()) if is_value(a)]
        name, vector = f"v{len(self._values)}", aten_text.VECTORS[aten_text.STORAGE[instruction.dtype][1]]
        has_columns = any(self._values[n].has_columns for n in operands)
        if packet in aten_text.REDUCTIONS:
            has_columns, expression = False, self._reduce(packet, instruction, operands[0])
        elif packet in aten_text.SOFTMAX:
            expression = self._softmax(instruction, operands[0])
        else:
            expression = expression_of(packet, instruction, self._values)
        expression = as_held(instruction.dtype, expression)
        statement = f"const {vector} {name} = {expression};"
        if not has_columns:
            self._row.append(statement)
        rank = max((self._values[n].rank for n in operands), default=0)
        self._values.append(Value(name, instruction.dtype, rank, has_columns, statement, tuple(operands)))

    def store(self, tensor: int, number: int, spec: ArgSpec) -> None:
        """Write a value to a result of the group."""
        value, stride = self._values[number], self._columns.strides[tensor]
        if value.dtype != spec.dtype:
            raise Refused(f"value {number} is {value.dtype}, its result {spec.dtype}: they must be equal")
        if stride == 0:
            if value.has_columns and self._columns.size != 1:
                raise Refused(f"value {number} differs by column, its result of shape {list(spec.shape)} does not")
            if not value.has_columns:
                self._row.append(f"if (first == 0) {_store(value, f't{tensor}', 1, '1')}")
                return
        place = f"t{tensor} + i * {cpp_dim(stride)}"
        self._stores.append((number, _store(value, place, stride, "lanes")))

    def _reduce(self, packet: str, instruction: Instruction, number: int) -> str:
        source, kind = self._values[number], aten_text.STORAGE[instruction.dtype][1]
        dims, keeps = _reduced(packet, instruction)
        self._check_whole_row(instruction, source, dims, keeps)
        join, fold, starts = aten_text.REDUCTIONS[packet]
        if kind not in starts:
            raise Refused(f"{instruction} has no C++ form for {instruction.dtype}")
        total = self._reduction(aten_text.VECTORS[kind], starts[kind], join, fold, number, source.as_kind(kind))
        return total if packet != "mean" else f"{total} / float({cpp_dim(self._columns.size)})"

    def _softmax(self, instruction: Instruction, number: int) -> str:
        source = self._values[number]
        self._check_whole_row(instruction, source, instruction.args[1], True)
        join, fold, starts = aten_text.REDUCTIONS["amax"]
        x = source.as_kind("f")
        top = self._reduction("vf", starts["f"], join, fold, number, x)
        join, fold, starts = aten_text.REDUCTIONS["sum"]
        total = self._reduction("vf", starts["f"], join, fold, number, f"exp_of({x} - {top})")
        return f"exp_of({x} - {top}) / {total}"

    def _check_whole_row(self, instruction: Instruction, source: Value, dims: Any, keeps: bool) -> None:
        last = (-1, source.rank - 1)
        is_last = dims in last or (isinstance(dims, list | tuple) and len(dims) == 1 and dims[0] in last)
        if not is_last or not keeps or not source.has_columns:
            raise Refused(
                f"{instruction}: only reductions of whole rows (the last dimension, kept) are part of a group"
            )

    def _reduction(self, vector: str, start: str, join: str, fold: str, number: int, source: str) -> str:
        """A loop that joins ``source``, an expression of value ``number``, over the row; the name of its result."""
        self._num_reductions += 1
        name = f"r{self._num_reductions}"
        held = f"keep({vector}({source}), lanes, {vector}({start}))"
        self._row += [
            f"{vector} {name}_lanes = {start};",
            *self._loop([number], [f"{name}_lanes = {join.format(f'{name}_lanes', held)};"]),
            f"const {vector} {name} = {fold}({name}_lanes);",
        ]
        return name

    def _loop(self, targets: list[int], uses: list[str]) -> list[str]:
        """A loop over the columns: the statements that make ``targets``, then ``uses``."""
        needed: set[int] = set()
        pending = list(targets)
        while pending:
            number = pending.pop()
            if number not in needed and self._values[number].has_columns:
                needed.add(number)
                pending += self._values[number].reads
        inside = [self._values[number].statement for number in sorted(needed)] + uses
        body = textwrap.indent("\n".join(inside), "  ")
        return ["for_columns(first, last, [&](int64_t i, auto lanes) {", *body.splitlines(), "});"]


def _store(value: Value, place: str, stride: Dim, lanes: str) -> str:
    storage, step = aten_text.STORAGE[value.dtype][0], cpp_dim(stride)
    if value.kind == "f":
        plain = f"store_lanes({place}, {value.name}, {lanes});"
        return plain if stride == 1 else f"store_strided({place}, {step}, {value.name}, {lanes});"
    name = f"-{value.name}" if value.kind == "b" else value.name
    return f"store_ints<{storage}>({place}, {step}, {aten_text.VECTORS[value.kind]}({name}), {lanes});"


def _reduced(packet: str, instruction: Instruction) -> tuple[Any, bool]:
    """The reduced dimensions and whether they are kept."""
    args = instruction.args[1:]
    dims = args[0] if args else instruction.kwargs.get("dim")
    return dims, bool(args[1] if len(args) > 1 else instruction.kwargs.get("keepdim", False))
