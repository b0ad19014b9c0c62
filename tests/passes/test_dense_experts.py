"""Llama 4's experts: computed for every token by the model, routed by the pass."""

import pytest
import torch
from torch import fx

from graphserve.compiler.pipeline import LIFT, run_pipeline
from graphserve.passes import dense_experts
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, is_op
from tests.passes.graphs import MAX_LEN, model_graph, ops

BEFORE = LIFT[: LIFT.index(dense_experts.PASS)]


def prepared() -> tuple[fx.GraphModule, PassContext]:
    gm = model_graph("llama4_text")
    ctx = PassContext(gm, MAX_LEN)
    run_pipeline(gm, ctx, BEFORE)
    return gm, ctx


def only(gm: fx.GraphModule, *targets: object) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_op(n, *targets)]


def test_each_experts_layer_becomes_one_op_whose_cost_grows_with_chosen_experts() -> None:
    gm, ctx = prepared()
    layers = len(only(gm, aten.bmm.default)) // 2
    report = run_pipeline(gm, ctx, (dense_experts.PASS,))[0]
    assert report.matches == layers == 2 and not report.refusals
    left = ops(gm)
    assert left.count("gs.moe") == layers
    assert not {"aten.bmm", "aten.repeat", "aten.scatter"} & set(left)
    assert run_pipeline(gm, ctx, (dense_experts.PASS,))[0].matches == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda gm: _replace_fill(gm, 0.0), "not sigmoid of chosen scores"),
        (lambda gm: _replace_sigmoid(gm), "not sigmoid of chosen scores"),
        (lambda gm: _use_twice(gm), "used elsewhere"),
    ],
)
def test_near_misses_are_refused_with_a_reason(change: object, reason: str) -> None:
    gm, ctx = prepared()
    assert callable(change)
    change(gm)
    report = run_pipeline(gm, ctx, (dense_experts.PASS,))[0]
    assert any(reason in refusal.reason for refusal in report.refusals)
    assert report.matches < 2


def _replace_fill(gm: fx.GraphModule, value: float) -> None:
    node = only(gm, aten.full_like.default)[0]
    node.args = (node.args[0], value)


def _replace_sigmoid(gm: fx.GraphModule) -> None:
    node = next(n for n in only(gm, aten.sigmoid.default) if is_op(n.args[0], aten.scatter.src))
    node.target = aten.tanh.default


def _use_twice(gm: fx.GraphModule) -> None:
    repeated = only(gm, aten.repeat.default)[0]
    root = next(n for n in only(gm, aten.sum.dim_IntList))
    with gm.graph.inserting_before(root):
        extra = gm.graph.call_function(torch.ops.aten.relu.default, (repeated,))
        extra.meta["val"] = repeated.meta["val"]
        size = gm.graph.call_function(torch.ops.aten.sum.dim_IntList, (extra, [1]))
        size.meta["val"] = repeated.meta["val"].sum(1)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((output.args[0], size),)
