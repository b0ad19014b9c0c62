"""rope: the spellings of rotation, and near misses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphserve.passes.rope import PASS as ROPE
from tests.passes.checks import ignores, refuses, rewrites
from tests.passes.graphs import TOKENS

H, D = 3, 8


def _x(dtype: torch.dtype = torch.float32, heads_first: bool = True) -> Tensor:
    shape = (1, H, TOKENS, D) if heads_first else (1, TOKENS, H, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _tables(width: int = D, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    angles = torch.arange(TOKENS)[:, None] / 10 * torch.rand(width, generator=torch.Generator().manual_seed(1))
    return {"c": angles.cos()[None].to(dtype), "s": angles.sin()[None].to(dtype)}


def _half(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def _every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _llama(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return x * c.unsqueeze(1) + _half(x) * s.unsqueeze(1)


def _parts(
    split: Callable[[Tensor], tuple[Tensor, Tensor]], join: Callable[[Tensor, Tensor], Tensor]
) -> Callable[..., Tensor]:
    def form(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        a, b = split(x)
        c, s = c.unsqueeze(1), s.unsqueeze(1)
        return join(a * c - b * s, b * c + a * s)

    return form


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.chunk(2, dim=-1)
    return a, b


def _alternating(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., ::2], x[..., 1::2]


def _cat(p: Tensor, q: Tensor) -> Tensor:
    return torch.cat((p, q), dim=-1)


def _interleave(p: Tensor, q: Tensor) -> Tensor:
    return torch.stack((p, q), dim=-1).flatten(-2)


FORMS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "rotate half": (_llama, D),
    "rotate half, product order": (lambda x, c, s: s.unsqueeze(1) * _half(x) + c.unsqueeze(1) * x, D),
    "every two": (lambda x, c, s: x * c.unsqueeze(1) + _every_two(x) * s.unsqueeze(1), D),
    "halves joined": (_parts(_halves, _cat), D // 2),
    "pairs joined": (_parts(_alternating, _interleave), D // 2),
    "pairs to halves": (_parts(_alternating, _cat), D // 2),
}
STYLES = {"every two": "interleaved", "pairs joined": "interleaved", "pairs to halves": "interleaved_to_half"}


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_of_rotation_becomes_one_op(form: str) -> None:
    function, width = FORMS[form]
    left = rewrites(ROPE, function, {"x": _x()} | _tables(width))
    assert left[-1] == "gs.rope" and not {"aten.mul", "aten.neg", "aten.add", "aten.sub"} & set(left)


def test_tokens_first_layout_is_understood() -> None:
    tokens_first = lambda x, c, s: x * c.unsqueeze(2) + _half(x) * s.unsqueeze(2)  # noqa: E731
    assert rewrites(ROPE, tokens_first, {"x": _x(heads_first=False)} | _tables()) == ["gs.rope"]


def test_complex_rotation_becomes_one_op() -> None:
    def form(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().reshape(1, -1, H, D // 2, 2))
        return torch.view_as_real(turned * torch.complex(c, s)[:, :, None, :]).flatten(3).type_as(x)

    left = rewrites(ROPE, form, {"x": _x(heads_first=False)} | _tables(D // 2))
    assert left.count("gs.rope") == 1 and "aten.view_as_complex" not in left


def test_partial_rotary_takes_the_rest_along() -> None:
    def form(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return torch.cat((_llama(x[..., :4], c, s), x[..., 4:]), dim=-1)

    assert rewrites(ROPE, form, {"x": _x()} | _tables(4), matches=2) == ["gs.rope"]


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_casts_around_the_rotation_go_into_the_op(table_dtype: torch.dtype) -> None:
    def form(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return _llama(x.float(), c, s).to(x.dtype)

    left = rewrites(ROPE, form, {"x": _x(torch.bfloat16)} | _tables(dtype=table_dtype), tolerance=0.0)
    assert left[-1] == "gs.rope" and left.count("aten.to") == (0 if table_dtype == torch.float32 else 2)


def test_rotations_that_the_op_cannot_write_are_refused() -> None:
    inputs = {"x": _x()} | _tables(D // 2)
    refuses(ROPE, _parts(_halves, _interleave), inputs, reason="half to interleaved")
    wide = {"x": _x(torch.bfloat16)} | _tables()
    refuses(ROPE, _llama, wide, reason="input is torch.bfloat16, the result torch.float32")
    per_head = {"x": _x(), "c": torch.rand(1, H, TOKENS, D), "s": torch.rand(1, H, TOKENS, D)}
    refuses(ROPE, lambda x, c, s: x * c + _half(x) * s, per_head, reason="does not give one row a token")
    flat = {"x": torch.randn(1, TOKENS, D)} | _tables()
    refuses(ROPE, lambda x, c, s: x * c + _half(x) * s, flat, reason="neither [1, H, T, D]")


def test_partial_rotary_whose_rotated_part_is_used_alone_is_refused() -> None:
    def form(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        rotated = _llama(x[..., :4], c, s)
        return torch.cat((rotated, x[..., 4:]), dim=-1) * rotated.sum()

    refuses(ROPE, form, {"x": _x()} | _tables(4), reason="used elsewhere", matches=1)


def test_near_rotations_are_none() -> None:
    inputs = {"x": _x()} | _tables()
    ignores(ROPE, lambda x, c, s: x * c.unsqueeze(1) + _half(x + 1) * s.unsqueeze(1), inputs)
    ignores(ROPE, lambda x, c, s: x * c.unsqueeze(1) - _half(x) * s.unsqueeze(1), inputs)
    other_way = lambda x: torch.cat((x[..., 4:], -x[..., :4]), -1)  # noqa: E731
    ignores(ROPE, lambda x, c, s: x * c.unsqueeze(1) + other_way(x) * s.unsqueeze(1), inputs)
