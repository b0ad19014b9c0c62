"""A group of elementwise ATen calls as data: what one generated kernel computes in registers.

Values are numbered: the group's inputs first, then one for each instruction. Arguments are written as in
:class:`graphserve.plan.schema.Launch`, with ``{"v": number}`` for a value.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec

GROUP_DTYPES = frozenset({"float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"})
# ATen packets of one element each; the generators have a form for every one of them.
GROUP_OPS = frozenset((
    "exp", "exp2", "expm1", "log", "log2", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "erf", "tanh", "sigmoid",
    "silu", "gelu", "floor", "ceil", "neg", "abs", "square", "relu", "mul", "div", "maximum", "minimum", "clamp",
    "clamp_min", "clamp_max", "bitwise_and", "bitwise_or", "bitwise_xor", "add", "sub", "rsub", "pow", "where",
    "masked_fill", "full_like", "zeros_like", "ones_like", "eq", "ne", "lt", "le", "gt", "ge", "logical_and",
    "logical_or", "logical_not", "bitwise_not", "_to_copy", "clone", "alias", "detach", "contiguous", "to",
))  # fmt: skip
# Packets over the last dimension, kept as size 1 or, for softmax, as it is.
ROW_OPS = frozenset(("sum", "mean", "amax", "amin", "_softmax", "softmax"))


class Instruction(msgspec.Struct, frozen=True, array_like=True):
    """One ATen call with one result.

    Attributes:
        op: ``aten.mul.Tensor``.
        args: positional arguments: ``{"v": number}``, ``{"dtype": name}``, ``{"f": "inf"}`` or plain JSON values.
        dtype: of the result, ``bfloat16``.
        kwargs: the other arguments.
    """

    op: str
    args: tuple[Any, ...]
    dtype: str
    kwargs: dict[str, Any] = {}

    def __str__(self) -> str:
        args = [_argument(a) for a in self.args] + [f"{k}={_argument(v)}" for k, v in self.kwargs.items()]
        return f"{self.op}({', '.join(args)}) -> {self.dtype}"


class PointwiseProgram(msgspec.Struct, frozen=True):
    """Instructions in order and the values that leave the group.

    Invariant: an instruction names only values before it.
    """

    num_inputs: int
    instructions: tuple[Instruction, ...]
    results: tuple[int, ...]

    def encode(self) -> str:
        """The JSON text that ``gs.pointwise`` takes."""
        return msgspec.json.encode(self).decode()

    @classmethod
    @functools.lru_cache(maxsize=1024)  # an eager launch reads its program in every step
    def decode(cls, text: str) -> PointwiseProgram:
        """Read what :meth:`encode` wrote.

        Raises:
            ValueError: the text is no program, or an instruction names a value that is not before it.
        """
        program = msgspec.json.decode(text, type=cls)
        for number, instruction in enumerate(program.instructions, start=program.num_inputs):
            for argument in (*instruction.args, *instruction.kwargs.values()):
                if is_value(argument) and not 0 <= argument["v"] < number:
                    raise ValueError(f"{instruction} names value {argument['v']}, but is value {number} itself")
        last = program.num_inputs + len(program.instructions)
        if not program.results or not all(0 <= result < last for result in program.results):
            raise ValueError(f"results {program.results} must name one or more of {last} values")
        return program

    def lines(self) -> list[str]:
        """One readable line an instruction."""
        return [f"v{n} = {i}" for n, i in enumerate(self.instructions, start=self.num_inputs)]


def is_value(argument: Any) -> bool:
    """Whether an argument stands for a value of the program."""
    return isinstance(argument, dict) and "v" in argument


def literal(argument: Any) -> Any:
    """A plain argument with ``{"f": "inf"}`` as the float it stands for."""
    return float(argument["f"]) if isinstance(argument, dict) and "f" in argument else argument


def _argument(argument: Any) -> str:
    if is_value(argument):
        return f"v{argument['v']}"
    if isinstance(argument, dict):
        return str(next(iter(argument.values())))
    return repr(argument)
