"""What every pass test checks: match count, equal results, refusal reason, and no second match."""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphserve.passes.base import Pass
from graphserve.passes.canonical_forms import PASS as CANONICAL_FORMS
from graphserve.passes.common_subexpressions import PASS as COMMON_SUBEXPRESSIONS
from graphserve.passes.no_ops import PASS as NO_OPS
from tests.passes.graphs import apply, graph_of, interpret, ops, run

Tensors = dict[str, torch.Tensor]
# What every pattern may assume to have run.
FIRST = (CANONICAL_FORMS, NO_OPS, COMMON_SUBEXPRESSIONS)


def rewrites(
    pass_: Pass,
    function: Callable[..., torch.Tensor],
    inputs: Tensors,
    weights: Tensors | None = None,
    *,
    matches: int = 1,
    before: tuple[Pass, ...] = (),
    tolerance: float = 1e-5,
) -> list[str]:
    """The pass matches ``matches`` times and then never again, and results stay; returns the ops that are left."""
    values = inputs | (weights or {})
    gm = graph_of(function, inputs, weights)
    expected = interpret(gm, values)
    reports, ctx = apply(gm, *FIRST, *before, pass_, pass_)
    assert reports[-2].matches == matches, reports[-2]
    assert reports[-1].matches == 0, reports[-1]
    actual = run(gm, ctx, values)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert float((actual.float() - expected.float()).abs().max()) <= tolerance * float(expected.float().abs().max())
    return ops(gm)


def refuses(
    pass_: Pass,
    function: Callable[..., torch.Tensor],
    inputs: Tensors,
    weights: Tensors | None = None,
    *,
    reason: str,
    before: tuple[Pass, ...] = (),
    matches: int = 0,
) -> None:
    """The pass sees a pattern, leaves it, and says ``reason``; ``matches`` others it rewrites."""
    gm = graph_of(function, inputs, weights)
    reports, _ = apply(gm, *FIRST, *before, pass_)
    assert reports[-1].matches == matches, reports[-1]
    assert [r for r in reports[-1].refusals if reason in r.reason], reports[-1].refusals


def ignores(
    pass_: Pass,
    function: Callable[..., torch.Tensor],
    inputs: Tensors,
    weights: Tensors | None = None,
    *,
    before: tuple[Pass, ...] = (),
) -> None:
    """The pass does not take the graph for its pattern at all."""
    gm = graph_of(function, inputs, weights)
    reports, _ = apply(gm, *FIRST, *before, pass_)
    assert reports[-1].matches == 0 and not reports[-1].refusals, reports[-1]
