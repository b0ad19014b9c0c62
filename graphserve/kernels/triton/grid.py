"""Values of the expressions that a kernel's launch is written in: grids and scratch sizes."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Mapping

from graphserve.kernels.arg_spec import Dim

_NAME = re.compile(r"[TRS]|B_\d+")
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"cdiv": lambda a, b: -(-a // b), "min": min, "max": max}


def evaluate(expression: Dim, scalars: Mapping[str, int]) -> int:
    """The value of an expression in T, R, S, B_g, integers, ``+ - * //``, ``cdiv(a, b)``, ``min`` and ``max``.

    Args:
        expression: text or a number.
        scalars: step scalars by name.

    Raises:
        ValueError: the expression is of another form, or names a scalar that is not given.
    """
    if isinstance(expression, int):
        return expression
    return _value(_parse(expression), scalars, expression)


def grid_size(grid: tuple[Dim, Dim, Dim], scalars: Mapping[str, int]) -> tuple[int, int, int]:
    """The three dimensions of a launch grid for one step."""
    x, y, z = (evaluate(axis, scalars) for axis in grid)
    return x, y, z


@functools.cache
def _parse(expression: str) -> ast.expr:
    """The same few expressions are evaluated for every launch of every step size."""
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is not an expression") from error


def _value(node: ast.expr, scalars: Mapping[str, int], text: str) -> int:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name) if _NAME.fullmatch(name):
            if name not in scalars:
                raise ValueError(f"{text!r} needs the step scalar {name}; given: {', '.join(scalars) or 'none'}")
            return scalars[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, scalars, text), _value(right, scalars, text))
        case ast.Call(func=ast.Name(id=name), args=[_, _] as args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(arg, scalars, text) for arg in args))
    raise ValueError(f"{text!r} is not an expression in T, R, S, B_g, + - * //, cdiv, min and max")
