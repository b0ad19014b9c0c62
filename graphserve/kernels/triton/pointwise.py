"""``gs.pointwise``: a group of elementwise ops, and of reductions over rows, in one kernel.

Each instruction is computed in fp32 (integers in their own type) and rounded to the dtype that the op has in the model,
so that the group gives what its ops give one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphserve.kernels.arg_spec import ArgSpec, Call, Dim, Refused, product, row_layout
from graphserve.kernels.pointwise_program import Instruction, PointwiseProgram, is_value, literal
from graphserve.kernels.triton import aten_text
from graphserve.kernels.triton.addresses import row_scalars, row_start
from graphserve.kernels.triton.expressions import round_to
from graphserve.kernels.triton.kernel import FLOAT_DTYPES, TL_DTYPES, KernelText, TritonKernel
from graphserve.kernels.triton.rows import RowProgram

# Columns of one program where rows need not be whole, see ``activation``.
TILE = 1024
_INTEGER_DTYPES = ("int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class _Value:
    """A value in registers: floats in fp32, already rounded to ``dtype``; integers in their own type."""

    name: str
    dtype: str
    has_columns: bool  # False: one value a row, or one in all

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOAT_DTYPES


def pointwise(call: Call, target: str) -> TritonKernel:
    """The group's inputs broadcast to one shape; results have this shape, or are one value a row of it."""
    program = PointwiseProgram.decode(call.attr("program"))
    inputs = [call.tensor(i, "input") for i in range(program.num_inputs)]
    for name, spec in [("input", s) for s in inputs] + [("result", s) for s in call.outputs]:
        if spec.dtype not in FLOAT_DTYPES + _INTEGER_DTYPES:
            raise Refused(f"an {name} is {spec.dtype}: groups hold {', '.join(FLOAT_DTYPES + _INTEGER_DTYPES)}")
    packets = [_packet(i) for i in program.instructions]
    whole_rows = any(p in aten_text.REDUCTIONS or p in aten_text.SOFTMAX for p in packets)
    outputs = call.outputs
    if not whole_rows and any(spec.shape and not isinstance(spec.shape[-1], int) for spec in [*inputs, *outputs]):
        inputs, outputs = list(map(_as_rows_of_one, inputs)), list(map(_as_rows_of_one, outputs))
    group = _Group.of([*inputs, *outputs])
    text = KernelText(Call(call.op, {"program": "; ".join(program.lines())}, call.args, call.outputs))
    rows = RowProgram(text, ArgSpec("float32", group.rows), group.width, target, None if whole_rows else TILE)
    for i in range(len(inputs)):
        text.pointer(f"in{i}_ptr", i)
    for i in range(len(call.outputs)):
        text.output(f"out{i}_ptr", i)
    text.scalar(*row_scalars(rows, [group.view(spec) for spec in inputs]))
    if "tanh" in packets or "expm1" in packets:
        text.helper(aten_text.TANH_HELPER)

    lines = [rows.head]
    values: list[_Value] = []
    for i, spec in enumerate(inputs):
        value = _Value(f"v{i}", spec.dtype, bool(spec.shape) and spec.shape[-1] == group.width)
        kind = ".to(tl.float32)" if value.is_float else ".to(tl.int1)" if spec.dtype == "bool" else ""
        lines.append(f"v{i} = {_load(text, rows, f'in{i}', group.view(spec))}{kind}")
        values.append(value)
    for instruction in program.instructions:
        lines += _instruction(instruction, values, rows)
    for i, (number, spec) in enumerate(zip(program.results, outputs, strict=True)):
        lines.append(_store(rows, f"out{i}", spec, group, values[number]))
    return text.build("\n".join(lines), rows.grid, rows.num_warps)


def _as_rows_of_one(spec: ArgSpec) -> ArgSpec:
    """The tensor with a further dimension of size 1: where the last one varies with the step, it becomes the rows."""
    if not spec.shape:
        return spec
    strides = None if spec.strides is None else (*spec.strides, 1)
    return ArgSpec(spec.dtype, (*spec.shape, 1), strides, spec.alignment)


@dataclass(frozen=True)
class _Group:
    """The shape that a group's tensors broadcast to."""

    shape: tuple[Dim, ...]

    @classmethod
    def of(cls, specs: list[ArgSpec]) -> _Group:
        rank = max(1, *(len(spec.shape) for spec in specs))
        shape: list[Dim] = [1] * rank
        for spec in specs:
            for axis, size in enumerate(spec.shape, start=rank - len(spec.shape)):
                if size == 1 or size == shape[axis]:
                    continue
                if shape[axis] != 1:
                    raise Refused(f"shapes {[list(s.shape) for s in specs]} do not broadcast to one")
                shape[axis] = size
        if not isinstance(shape[-1], int):
            raise Refused(f"the last dimension of {shape} must be a constant where rows are reduced")
        return cls(tuple(shape))

    @property
    def width(self) -> int:
        width = self.shape[-1]
        assert isinstance(width, int)
        return width

    @property
    def rows(self) -> tuple[Dim, int]:
        """The shape as a list of rows."""
        return product(self.shape[:-1]), self.width

    def view(self, spec: ArgSpec) -> ArgSpec:
        """``spec`` seen in the group's shape, with stride 0 where it has one element for many; a list of rows where
        the leading dimensions need not be told apart.
        """
        if spec.is_contiguous and spec.shape == self.shape:
            return ArgSpec(spec.dtype, self.rows)
        strides: list[Dim] = [0] * (len(self.shape) - len(spec.shape))
        strides += [0 if size == 1 else spec.stride(axis) for axis, size in enumerate(spec.shape)]
        return ArgSpec(spec.dtype, self.shape, tuple(strides))


def _load(text: KernelText, rows: RowProgram, name: str, spec: ArgSpec) -> str:
    """Elements of ``spec``, seen in the group's shape: with rows, columns, both or neither."""
    has_rows = any(spec.stride(axis) != 0 for axis in range(len(spec.shape) - 1))
    column = spec.int_stride(-1)
    place = [f"{name}_ptr"]
    if has_rows:
        place.append(row_start(text, name.upper(), spec))
    if column:
        place.append("column" if column == 1 else f"column * {column}")
    return f"tl.load({' + '.join(place)}{rows.mask_for(has_rows, column != 0)})"


def _store(rows: RowProgram, name: str, spec: ArgSpec, group: _Group, value: _Value) -> str:
    if spec.shape == group.shape:
        return rows.store(f"{name}_ptr", name.upper(), group.view(spec), value.name)
    one_a_row = spec.shape == (*group.shape[:-1], 1) and not value.has_columns
    if not one_a_row or row_layout(spec) != row_layout(ArgSpec(spec.dtype, spec.shape)):
        raise Refused(
            f"a result of shape {list(spec.shape)} in a group of shape {list(group.shape)}: it must have the group's "
            "shape, or be contiguous with one value a row"
        )
    return rows.store_row(f"{name}_ptr", value.name)


def _packet(instruction: Instruction) -> str:
    namespace, packet, *_ = instruction.op.split(".")
    if namespace != "aten" or packet not in aten_text.SUPPORTED:
        raise Refused(f"{instruction.op} has no elementwise Triton form")
    return packet


def _instruction(instruction: Instruction, values: list[_Value], rows: RowProgram) -> list[str]:
    """Statements of one instruction; appends its value."""
    if instruction.dtype not in FLOAT_DTYPES + _INTEGER_DTYPES:
        raise Refused(f"{instruction} has a dtype that groups do not hold")
    packet, name = _packet(instruction), f"v{len(values)}"
    operands = [values[a["v"]] for a in instruction.args if is_value(a)]
    reduces = packet in aten_text.REDUCTIONS
    has_columns = not reduces and any(o.has_columns for o in operands)
    value = _Value(name, instruction.dtype, has_columns)
    if reduces or packet in aten_text.SOFTMAX:
        lines = _reduction(packet, instruction, operands[0], value, rows)
    else:
        lines = [f"{name} = {_expression(packet, instruction, values)}"]
    lines[0] += f"  # {instruction.op}"
    if value.is_float and value.dtype != "float32":
        lines.append(f"{name} = {round_to(value.dtype, name)}")
    elif not value.is_float:
        lines.append(f"{name} = {name}.to({TL_DTYPES[value.dtype]})")
    values.append(value)
    return lines


def _reduction(packet: str, instruction: Instruction, x: _Value, value: _Value, rows: RowProgram) -> list[str]:
    dims, keeps = _reduced(packet, instruction)
    if dims not in ([-1], -1) or not keeps or not x.has_columns:
        raise Refused(f"{instruction}: only reductions of whole rows (dimension -1, kept) are part of a group")
    source = x.name if x.is_float == value.is_float else _as(x, value.is_float)
    if packet in aten_text.SOFTMAX:
        held = f'tl.where(mask, {source}, float("-inf"))' if rows.is_masked else source
        return [
            f"{value.name} = {held}",
            f"{value.name} = tl.exp({value.name} - tl.max({value.name}, axis=1, keep_dims=True))",
            f"{value.name} = {value.name} / tl.sum({value.name}, axis=1, keep_dims=True)",
        ]
    form, outside = aten_text.REDUCTIONS[packet]
    if not value.is_float and outside != "0":
        raise Refused(f"{instruction}: largest and smallest values of integers have no Triton form")
    return [f"{value.name} = {form.format(f'tl.where(mask, {source}, {outside})' if rows.is_masked else source)}"]


def _reduced(packet: str, instruction: Instruction) -> tuple[Any, bool]:
    """The reduced dimensions and whether they are kept."""
    args = [*instruction.args[1:]]
    if packet in aten_text.SOFTMAX:
        return args[0], True
    dims = args[0] if args else instruction.kwargs.get("dim")
    keeps = args[1] if len(args) > 1 else instruction.kwargs.get("keepdim", False)
    return (list(dims) if isinstance(dims, list | tuple) else dims), bool(keeps)


def _as(value: _Value, wants_float: bool) -> str:
    if value.is_float == wants_float:
        return value.name
    return f"{value.name}.to(tl.float32)" if wants_float else f"{value.name}.to(tl.int64)"


def _expression(packet: str, instruction: Instruction, values: list[_Value]) -> str:
    """The value of an elementwise instruction, before it is rounded to its dtype."""
    is_float = instruction.dtype in FLOAT_DTYPES

    def operand(argument: Any, as_float: bool = is_float) -> str:
        if is_value(argument):
            return _as(values[argument["v"]], as_float)
        number = literal(argument)
        if not isinstance(number, int | float):
            raise Refused(f"{instruction}: the argument {argument!r} has no Triton form")
        number = float(number) if as_float else int(number)
        return f'float("{number}")' if number in (float("inf"), float("-inf")) or number != number else repr(number)

    args = instruction.args
    if packet in aten_text.COPIES:
        source = values[args[0]["v"]]
        return _as(source, True) if is_float else source.name
    if packet in aten_text.FLOAT_UNARY:
        if not is_float:
            raise Refused(f"{instruction} on integers has no Triton form")
        return aten_text.FLOAT_UNARY[packet].format(operand(args[0]))
    if packet == "gelu":
        return aten_text.gelu(instruction.kwargs.get("approximate", "none"))(operand(args[0]))
    if packet in aten_text.COMPARISONS or packet in aten_text.LOGICAL:
        if packet == "bitwise_not" and instruction.dtype != "bool":
            raise Refused(f"{instruction} on numbers has no Triton form")
        return _truth(packet, args, values, operand)
    if packet == "where":
        return f"tl.where({operand(args[0], False)} != 0, {operand(args[1])}, {operand(args[2])})"
    if packet == "masked_fill":
        return f"tl.where({operand(args[1], False)} != 0, {operand(args[2])}, {operand(args[0])})"
    if packet in ("full_like", "zeros_like", "ones_like"):
        number = args[1] if packet == "full_like" else int(packet == "ones_like")
        return f"tl.full([1, 1], {operand(number)}, {'tl.float32' if is_float else 'tl.int64'})"
    if packet in ("add", "sub", "rsub"):
        first, second = args[0], args[1]
        alpha = literal(args[2] if len(args) > 2 else instruction.kwargs.get("alpha", 1))
        if packet == "rsub":
            first, second = (second, first)
        scaled = operand(second) if alpha == 1 else f"{operand(alpha)} * {operand(second)}"
        if packet == "rsub" and alpha != 1:
            raise Refused(f"{instruction}: rsub with alpha has no Triton form")
        return f"{operand(first)} {'+' if packet == 'add' else '-'} {scaled}"
    if packet == "pow":
        exponent = literal(args[1])
        if not isinstance(exponent, int | float) or float(exponent) not in aten_text.POWERS or not is_float:
            raise Refused(f"{instruction}: only the powers {', '.join(map(str, aten_text.POWERS))} have a Triton form")
        return aten_text.POWERS[float(exponent)].format(operand(args[0]))
    if packet == "clamp":
        bounds = [args[i] if len(args) > i else instruction.kwargs.get(key) for i, key in ((1, "min"), (2, "max"))]
        expression = operand(args[0])
        for bound, form in zip(bounds, ("clamp_min", "clamp_max"), strict=True):
            if bound is not None:
                expression = aten_text.ARITHMETIC[form].format(expression, operand(bound))
        return expression
    if packet == "div" and (not is_float or instruction.kwargs.get("rounding_mode")):
        raise Refused(f"{instruction}: only true division has a Triton form")
    return aten_text.ARITHMETIC[packet].format(*(operand(a) for a in args[:2]))


def _truth(packet: str, args: tuple[Any, ...], values: list[_Value], operand: Any) -> str:
    """Comparisons and logic, computed in floats if an operand is one."""
    numbers = [values[a["v"]].is_float if is_value(a) else isinstance(literal(a), float) for a in args]
    operands = [operand(a, any(numbers)) for a in args]
    if packet in aten_text.COMPARISONS:
        return f"{operands[0]} {aten_text.COMPARISONS[packet]} {operands[1]}"
    return aten_text.LOGICAL[packet].format(*(f"({o} != 0)" for o in operands))
