"""Routers of mixtures of experts become one op, in the spellings of several models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphserve.compiler.pipeline import PIPELINE
from graphserve.kernels import register_all
from graphserve.passes.route import PASS as ROUTE
from tests.passes.checks import ignores, refuses, rewrites
from tests.passes.graphs import TOKENS, apply, eager, model_graph, ops, packed_logits

register_all()

PIPELINE_WITHOUT_ROUTE = tuple(p for p in PIPELINE if p is not ROUTE)
EXPERTS, TOP_K, HIDDEN = 6, 2, 8
INPUTS = {
    "logits": torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)),
    "x": torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)),
}
WEIGHTS = {
    "up": torch.randn(EXPERTS, 2 * 4, HIDDEN, generator=torch.Generator().manual_seed(2)),
    "down": torch.randn(EXPERTS, HIDDEN, 4, generator=torch.Generator().manual_seed(3)),
}
BIAS = {"bias": torch.randn(EXPERTS, generator=torch.Generator().manual_seed(4))}


def experts(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.ops.gs.moe(x, ids, weights, up, None, down, None, "silu", False, False, 0.0, 0.0)


def mixtral(logits: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    values, ids = torch.topk(logits.softmax(-1), TOP_K)
    return experts(x, ids, values / values.sum(-1, keepdim=True), up, down)


def gpt_oss(logits: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    values, ids = torch.topk(logits, TOP_K)
    return experts(x, ids, values.softmax(1, dtype=values.dtype), up, down)


def llama4(logits: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    values, ids = torch.topk(logits, TOP_K)
    return experts(x, ids, values.sigmoid(), up, down)


def minimax(logits: Tensor, x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    scores = logits.sigmoid()
    ids = torch.topk(scores + bias, TOP_K, sorted=False)[1]
    values = scores.gather(1, ids)
    return experts(x, ids, values / (values.sum(-1, keepdim=True) + 1e-6) * 2.5, up, down)


def grouped(
    fill: float, scores_of: Callable[[Tensor], Tensor] = torch.sigmoid, rank: str = "sum"
) -> Callable[..., Tensor]:
    """DeepSeek's choice of the best of three groups."""

    def function(logits: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        scores = scores_of(logits)
        groups = scores.reshape(-1, 3, EXPERTS // 3)
        ranks = groups.topk(2, dim=-1)[0].sum(-1) if rank == "sum" else groups.max(dim=-1)[0]
        best = torch.topk(ranks, 2, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(ranks).scatter(1, best, 1)
        mask = mask.unsqueeze(-1).expand(-1, 3, EXPERTS // 3).reshape(-1, EXPERTS)
        ids = torch.topk(scores.masked_fill(~mask.bool(), fill), TOP_K, dim=-1)[1]
        return experts(x, ids, scores.gather(1, ids), up, down)

    return function


@pytest.mark.parametrize("function", [mixtral, gpt_oss, llama4, grouped(float("-inf"))])
def test_routers_of_published_models_become_one_op(function: Callable[..., Tensor]) -> None:
    assert rewrites(ROUTE, function, INPUTS, WEIGHTS) == ["gs.route", "gs.moe"]


def test_a_bias_decides_the_choice_alone() -> None:
    assert rewrites(ROUTE, minimax, INPUTS, WEIGHTS | BIAS) == ["gs.route", "gs.moe"]


def test_groups_ranked_by_their_best_expert_and_filled_with_zero_after_a_softmax() -> None:
    function = grouped(0.0, lambda logits: logits.softmax(-1), "max")
    assert rewrites(ROUTE, function, INPUTS, WEIGHTS) == ["gs.route", "gs.moe"]


def test_groups_filled_with_zero_where_a_score_may_be_negative_are_left() -> None:
    left = rewrites(ROUTE, grouped(0.0, lambda logits: logits * 1.5), INPUTS, WEIGHTS, matches=0)
    assert "gs.route" not in left


def test_weights_of_other_scores_than_the_choice_are_left() -> None:
    def function(logits: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ids = torch.topk(logits.softmax(-1), TOP_K)[1]
        return experts(x, ids, logits.sigmoid().gather(1, ids), up, down)

    ignores(ROUTE, function, INPUTS, WEIGHTS)


def test_the_smallest_experts_are_left() -> None:
    def function(logits: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        values, ids = torch.topk(logits.softmax(-1), TOP_K, largest=False)
        return experts(x, ids, values, up, down)

    ignores(ROUTE, function, INPUTS, WEIGHTS)


def test_a_sum_over_all_experts_is_left() -> None:
    def function(logits: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        scores = logits.sigmoid()
        values, ids = torch.topk(scores, TOP_K)
        return experts(x, ids, values / scores.sum(-1, keepdim=True), up, down)

    ignores(ROUTE, function, INPUTS, WEIGHTS)


def test_a_router_whose_scores_are_read_elsewhere_is_refused() -> None:
    def function(logits: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        scores = logits.softmax(-1)
        values, ids = torch.topk(scores, TOP_K)
        return experts(x, ids, values, up, down) + scores.sum(-1, keepdim=True)

    refuses(ROUTE, function, INPUTS, WEIGHTS, reason="is used by")


@pytest.mark.parametrize(
    "name", ["deepseek_v3", *(pytest.param(n, marks=pytest.mark.full) for n in ("qwen3_moe", "gpt_oss", "llama4_text"))]
)
def test_every_router_of_a_model_is_lifted_and_no_logit_moves(name: str) -> None:
    gm = model_graph(name)
    reports, ctx = apply(gm, *PIPELINE_WITHOUT_ROUTE)
    requests = [[5, 6, 7, 8, 9], [11]]
    before = packed_logits(gm, ctx, eager(name), requests)
    routed = model_graph(name)
    reports, ctx = apply(routed, *PIPELINE)
    found = next(r for r in reports if r.name == "route")
    assert found.matches == ops(routed).count("gs.route") == ops(routed).count("gs.moe") > 0
    assert not {"aten.topk", "aten.softmax", "aten.scatter"} & set(ops(routed))
    torch.testing.assert_close(packed_logits(routed, ctx, eager(name), requests), before, rtol=1e-5, atol=1e-5)
