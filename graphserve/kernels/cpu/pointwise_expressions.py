"""C++ expressions of the instructions of a ``pointwise`` group.

Each instruction is computed in fp32 (integers in their own type) and rounded to the dtype that the op has in the model,
so that the group gives what its ops give one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphserve.kernels.arg_spec import Refused
from graphserve.kernels.cpu import aten_text
from graphserve.kernels.cpu.kernel import cpp_float
from graphserve.kernels.pointwise_program import Instruction, is_value, literal


@dataclass(frozen=True)
class Value:
    """A value in lanes: floats in fp32, already rounded to ``dtype``.

    ``reads``: the column values it is computed from. Without columns there is one value a row.
    """

    name: str
    dtype: str
    rank: int
    has_columns: bool
    statement: str = ""
    reads: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        return aten_text.STORAGE[self.dtype][1]

    def as_kind(self, kind: str) -> str:
        if self.kind == kind:
            return self.name
        return aten_text.CONVERSIONS[self.kind, kind].format(self.name)


def as_held(dtype: str, expression: str) -> str:
    """An expression rounded to its dtype."""
    if dtype == "bfloat16":
        return f"rounded<bf16>({expression})"
    if dtype in ("int16", "int8", "uint8"):
        return f"wrapped<{aten_text.STORAGE[dtype][0]}>({expression})"
    return expression


def packet_of(instruction: Instruction) -> str:
    namespace, packet, *_ = instruction.op.split(".")
    if namespace != "aten" or packet not in aten_text.SUPPORTED:
        raise Refused(f"{instruction.op} has no elementwise C++ form")
    return packet


def _number(instruction: Instruction, argument: Any, kind: str) -> str:
    """A plain argument as lanes of ``kind``."""
    number = literal(argument)
    if not isinstance(number, int | float):
        raise Refused(f"{instruction}: the argument {argument!r} has no C++ form")
    if kind == "f":
        return "set1(NAN)" if number != number else f"set1({cpp_float(number)})"
    if kind == "b":
        return f"set1i({-1 if number else 0})"
    whole, bits = int(number), 32 if kind == "i" else 64
    if not -(2 ** (bits - 1)) <= whole < 2 ** (bits - 1):
        raise Refused(f"{instruction}: {whole} is no {bits}-bit integer")
    return f"set1{kind}({whole + 1}LL - 1)"  # the smallest int64 is no literal of C++


def expression_of(packet: str, instruction: Instruction, values: list[Value]) -> str:
    """The value of an elementwise instruction, before it is rounded to its dtype."""
    args, dtype = instruction.args, instruction.dtype
    kind = aten_text.STORAGE[dtype][1]
    # Arithmetic on truth values counts in integers.
    worked = "i" if kind == "b" else kind

    def operand(argument: Any, to: str = worked) -> str:
        if not is_value(argument):
            return _number(instruction, argument, to)
        value = values[argument["v"]]
        # An op on bf16 and integers takes the integers as bf16, but for single numbers.
        as_bf16 = dtype == "bfloat16" and value.kind in "il" and to == "f" and value.rank > 0
        return f"rounded<bf16>({value.as_kind(to)})" if as_bf16 else value.as_kind(to)

    def arithmetic(form: str, *operands: str) -> str:
        table = aten_text.FLOAT_ARITHMETIC if worked == "f" else aten_text.INT_ARITHMETIC
        if form not in table:
            raise Refused(f"{instruction} has no C++ form for {dtype}")
        expression = table[form].format(*operands)
        return f"({expression}) != 0" if kind == "b" else expression

    if packet in aten_text.COPIES:
        return operand(args[0], kind)
    if packet in aten_text.CONSTANTS:
        constant = aten_text.CONSTANTS[packet]
        return _number(instruction, args[1] if constant is None else constant, kind)
    if packet in aten_text.FLOAT_UNARY or packet == "gelu":
        if kind != "f":
            raise Refused(f"{instruction} on integers has no C++ form")
        approximate = instruction.kwargs.get("approximate", "none")
        if packet == "gelu" and approximate not in aten_text.GELU:
            raise Refused(f"aten.gelu with approximate={approximate!r} has no C++ form")
        form = aten_text.GELU[approximate] if packet == "gelu" else aten_text.FLOAT_UNARY[packet]
        return form.format(operand(args[0]))
    if packet in aten_text.COMPARISONS:
        return _comparison(packet, instruction, values)
    if packet in aten_text.LOGICAL:
        return aten_text.LOGICAL[packet].format(*(operand(a, "b") for a in args))
    if packet == "bitwise_not" and kind == "b":
        return f"~{operand(args[0], 'b')}"
    if packet in ("where", "masked_fill"):
        mask, chosen, other = args if packet == "where" else (args[1], args[2], args[0])
        return f"choose({operand(mask, 'b')}, {operand(chosen, kind)}, {operand(other, kind)})"
    if packet in ("add", "sub", "rsub"):
        alpha = literal(args[2] if len(args) > 2 else instruction.kwargs.get("alpha", 1))
        first, second = (args[1], args[0]) if packet == "rsub" else args[:2]
        scaled = operand(second)
        if alpha != 1 and packet == "rsub":
            raise Refused(f"{instruction}: rsub with alpha has no C++ form")
        if alpha != 1:
            scaled = f"({operand(alpha)} * {scaled})" if worked == "f" else f"wrap_mul({operand(alpha)}, {scaled})"
        return arithmetic("add" if packet == "add" else "sub", operand(first), scaled)
    if packet == "pow":
        exponent = literal(args[1])
        if not isinstance(exponent, int | float) or float(exponent) not in aten_text.POWERS or kind != "f":
            raise Refused(f"{instruction}: only the powers {', '.join(map(str, aten_text.POWERS))} have a C++ form")
        return aten_text.POWERS[float(exponent)].format(operand(args[0]))
    if packet == "clamp":
        bounds = [args[i] if len(args) > i else instruction.kwargs.get(key) for i, key in ((1, "min"), (2, "max"))]
        expression = operand(args[0])
        for bound, form in zip(bounds, ("maximum", "minimum"), strict=True):
            if bound is not None:
                expression = arithmetic(form, expression, operand(bound))
        return expression
    if packet == "div" and instruction.kwargs.get("rounding_mode"):
        raise Refused(f"{instruction}: only true division has a C++ form")
    return arithmetic(aten_text.CLAMPS.get(packet, packet), *(operand(a) for a in args[:2]))


def _comparison(packet: str, instruction: Instruction, values: list[Value]) -> str:
    """Compare in the dtype that ATen promotes the operands to; single numbers decide it only among themselves."""
    args = instruction.args
    read = [values[a["v"]] for a in args if is_value(a)]
    floats = [v for v in read if v.kind == "f" and v.rank > 0] or [v for v in read if v.kind == "f"]
    is_float = bool(floats) or any(isinstance(literal(a), float) for a in args if not is_value(a))
    narrow = bool(floats) and all(v.dtype == "bfloat16" for v in floats)
    kind = "f" if is_float else "l" if any(v.kind == "l" for v in read) else "i"
    sides = []
    for argument in args[:2]:
        value = values[argument["v"]] if is_value(argument) else None
        side = _number(instruction, argument, kind) if value is None else value.as_kind(kind)
        sides.append(f"rounded<bf16>({side})" if narrow and (value is None or value.dtype != "bfloat16") else side)
    compared = f"({sides[0]} {aten_text.COMPARISONS[packet]} {sides[1]})"
    return f"__builtin_convertvector({compared}, vi)" if kind == "l" else compared
