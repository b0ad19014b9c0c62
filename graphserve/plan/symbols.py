"""Affine expressions in the two sizes that vary from step to step: ``T`` (tokens) and ``R`` (logits rows)."""

from __future__ import annotations

import re
from typing import NamedTuple

_TERM = re.compile(r"([+-]?)(?:(\d+)\*?)?([TR])?")


class Affine(NamedTuple):
    """``t * T + r * R + c``, all coefficients integers."""

    t: int = 0
    r: int = 0
    c: int = 0

    def at(self, num_tokens: int, num_rows: int) -> int:
        return self.t * num_tokens + self.r * num_rows + self.c

    def __str__(self) -> str:
        parts = []
        for coefficient, symbol in ((self.t, "T"), (self.r, "R")):
            if coefficient:
                sign = "-" if coefficient < 0 else "+"
                parts.append(sign + (symbol if abs(coefficient) == 1 else f"{abs(coefficient)}*{symbol}"))
        if self.c or not parts:
            parts.append(f"{self.c:+d}")
        return "".join(parts).removeprefix("+")


def parse(expression: int | str) -> Affine:
    """Read what ``str(Affine)`` wrote.

    Raises:
        ValueError: the text is not an affine expression in T and R.
    """
    if isinstance(expression, int):
        return Affine(c=expression)
    t = r = c = 0
    position = 0
    while position < len(expression):
        match = _TERM.match(expression, position)
        if match is None or match.end() == position or not (match[2] or match[3]):
            raise ValueError(f"{expression!r} is not an affine expression in T and R")
        value = int(match[2] or 1) * (-1 if match[1] == "-" else 1)
        if match[3] == "T":
            t += value
        elif match[3] == "R":
            r += value
        else:
            c += value
        position = match.end()
    return Affine(t, r, c)


def evaluate(expression: int | str, num_tokens: int, num_rows: int) -> int:
    """The value of a dimension or size expression for a step."""
    return expression if isinstance(expression, int) else parse(expression).at(num_tokens, num_rows)
