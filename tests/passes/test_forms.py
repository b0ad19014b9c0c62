"""functionalize, canonical_forms, no_ops and common_subexpressions."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.passes.base import Pass
from graphserve.passes.canonical_forms import PASS as CANONICAL_FORMS
from graphserve.passes.common_subexpressions import PASS as COMMON_SUBEXPRESSIONS
from graphserve.passes.functionalize import PASS as FUNCTIONALIZE
from graphserve.passes.no_ops import PASS as NO_OPS
from tests.passes.graphs import TOKENS, apply, graph_of, interpret, ops

X = {"x": torch.randn(1, TOKENS, 8, generator=torch.Generator().manual_seed(0))}


def _same(function, *passes: Pass) -> tuple[list[str], list[int]]:  # type: ignore[no-untyped-def]
    """Applies the passes, checks the bits, and that each matches nothing a second time; (ops left, matches)."""
    gm = graph_of(function, X)
    values = {"x": X["x"].clone()}
    expected = interpret(graph_of(function, X), {"x": X["x"].clone()})
    matches = []
    for item in passes:
        reports, _ = apply(gm, item, item)
        assert reports[1].matches == 0, reports[1]
        matches.append(reports[0].matches)
    assert torch.equal(interpret(gm, values), expected)
    return ops(gm), matches


def test_in_place_ops_on_fresh_tensors_become_functional() -> None:
    def form(x: Tensor) -> Tensor:
        y = x.exp()
        y.div_(y.sum(-1, keepdim=True))
        return y * 2

    left, matches = _same(form, FUNCTIONALIZE)
    assert matches == [1] and "aten.div" in left and "aten.div_" not in left


def test_an_allocation_that_is_filled_part_by_part_becomes_a_concatenation() -> None:
    def form(x: Tensor) -> Tensor:
        out = x.new_empty(1, x.shape[1], 12)
        out[..., :8] = x
        out[..., 8:] = x[..., :1]
        return out * 2

    left, matches = _same(form, FUNCTIONALIZE)
    assert matches == [1] and left.count("aten.cat") == 1 and "aten.copy_" not in left


def test_a_write_into_a_part_becomes_a_scatter_of_the_slice() -> None:
    def form(x: Tensor) -> Tensor:
        out = x.exp()
        out[..., 2:4] = x[..., :2]
        return out + 1

    left, matches = _same(form, FUNCTIONALIZE)
    assert matches == [1] and "aten.slice_scatter" in left


def test_writes_that_others_may_see_are_refused() -> None:
    def into_input(x: Tensor) -> Tensor:
        return x.add_(1)

    def into_view(x: Tensor) -> Tensor:
        y = x.exp()
        half = y[..., :4]
        y.mul_(2)
        return half + 1

    def through_view(x: Tensor) -> Tensor:
        y = x.exp()
        y.view(-1, 8).mul_(2)
        return y

    for form, reason in ((into_input, "share memory"), (into_view, "is read after"), (through_view, "share memory")):
        reports, _ = apply(graph_of(form, X), FUNCTIONALIZE)
        assert reports[0].matches == 0
        assert reason in reports[0].refusals[0].reason


CANONICAL = {
    "type_as": (lambda x: x.bfloat16().type_as(x), ["aten.to", "aten.to"]),
    "view": (lambda x: x.view(1, x.shape[1], 2, 4), ["aten.reshape"]),
    "flatten": (lambda x: x.unflatten(-1, (2, 4)).flatten(-2), ["aten.reshape", "aten.reshape"]),
    "chunk": (lambda x: x.chunk(2, -1)[1] * 2, ["aten.slice", "aten.mul"]),
    "split": (lambda x: x.split([3, 5], -1)[0] * 2, ["aten.slice", "aten.mul"]),
}


@pytest.mark.parametrize("form", CANONICAL)
def test_several_spellings_become_one(form: str) -> None:
    function, expected = CANONICAL[form]
    left, _ = _same(function, CANONICAL_FORMS)
    assert [op for op in left if op != "aten.sym_size"] == expected


def test_reshapes_are_free_of_the_token_count() -> None:
    gm = graph_of(lambda x: x.view(1, x.shape[1], 2, 4), X)
    apply(gm, CANONICAL_FORMS)
    reshape = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert reshape.args[1] == [1, -1, 2, 4]
    assert not isinstance(reshape.meta["val"].shape[1], int)


NO_OP_FORMS = {
    "cast": lambda x: x.to(torch.float32),
    "round trip": lambda x: x.double().float(),
    "times one": lambda x: x * 1.0,
    "plus zero": lambda x: x + 0,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "expand": lambda x: x.expand(1, -1, 8),
    "slice": lambda x: x[:, :, 0:8],
    "view": lambda x: x.view(1, -1, 8),
    "there and back": lambda x: x.view(-1, 8).view(1, -1, 8),
    "two transposes": lambda x: x.transpose(1, 2).transpose(2, 1),
    "empty part": lambda x: torch.cat((x, x[..., 8:]), dim=-1),
}


@pytest.mark.parametrize("form", NO_OP_FORMS)
def test_ops_that_change_nothing_are_removed(form: str) -> None:
    function = NO_OP_FORMS[form]
    left, _ = _same(lambda x: function(x) * 2, CANONICAL_FORMS, NO_OPS)
    assert left == ["aten.mul"]


CHANGING = {
    "narrowing": lambda x: x.bfloat16().float(),
    "times two": lambda x: x * 2.0,
    "dropout in training": lambda x: F.dropout(x, 0.5, training=True),
    "every second": lambda x: x[..., ::2],
    "broadcast": lambda x: x[..., :1].expand(1, -1, 8),
    "other transposes": lambda x: x[:, None].transpose(1, 2).transpose(2, 3),
}


@pytest.mark.parametrize("form", CHANGING)
def test_ops_that_change_something_stay(form: str) -> None:
    gm = graph_of(CHANGING[form], X)
    apply(gm, CANONICAL_FORMS)
    before = ops(gm)
    reports, _ = apply(gm, NO_OPS)
    assert reports[0].matches == 0 and ops(gm) == before


def test_equal_calls_are_made_once() -> None:
    left, matches = _same(lambda x: x.exp() + x.exp() * x.exp(), COMMON_SUBEXPRESSIONS)
    assert matches == [2] and left.count("aten.exp") == 1


def test_calls_that_differ_or_draw_numbers_are_not_shared() -> None:
    _, matches = _same(lambda x: (x * 1 + x * 1.0) / (x * 2) + x.sum(0) + x.sum(1, keepdim=True), COMMON_SUBEXPRESSIONS)
    assert matches == [0]
    random = graph_of(lambda x: torch.bernoulli(x.sigmoid()) + torch.bernoulli(x.sigmoid()), X)
    apply(random, COMMON_SUBEXPRESSIONS)
    assert ops(random).count("aten.bernoulli") == 2
