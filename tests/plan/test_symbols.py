"""Expressions in T and R are read back as they were written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphserve.plan.symbols import Affine, evaluate, parse

coefficients = st.integers(-1000, 1000)


@given(coefficients, coefficients, coefficients)
def test_an_expression_survives_its_text(t: int, r: int, c: int) -> None:
    assert parse(str(Affine(t, r, c))) == Affine(t, r, c)


@given(coefficients, coefficients, coefficients, st.integers(0, 10_000), st.integers(0, 1000))
def test_the_text_has_the_value_of_the_expression(t: int, r: int, c: int, tokens: int, rows: int) -> None:
    assert evaluate(str(Affine(t, r, c)), tokens, rows) == t * tokens + r * rows + c


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (Affine(1), "T"),
        (Affine(4), "4*T"),
        (Affine(-1, 2), "-T+2*R"),
        (Affine(0, 1, -3), "R-3"),
        (Affine(), "0"),
        (Affine(c=7), "7"),
    ],
)
def test_the_text_is_short(expression: Affine, text: str) -> None:
    assert str(expression) == text


def test_an_integer_stands_for_itself() -> None:
    assert parse(12) == Affine(c=12)
    assert evaluate(12, 5, 5) == 12


@pytest.mark.parametrize("text", ["S", "T*T", "T/2", "2T*3", "+", "T+", "1.5*T"])
def test_other_text_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="is not an affine expression in T and R"):
        parse(text)
