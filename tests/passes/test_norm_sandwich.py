"""Post-norm, residual add and next norm as one op."""

import pytest
import torch
from torch import fx

from graphserve.compiler.pipeline import PIPELINE
from graphserve.passes import norm_sandwich
from graphserve.passes.match import is_add, is_gs
from tests.passes.graphs import apply, model_graph, ops

BEFORE = PIPELINE[: PIPELINE.index(norm_sandwich.PASS)]


def prepared(name: str) -> fx.GraphModule:
    gm = model_graph(name)
    apply(gm, *BEFORE[: next(i for i, p in enumerate(BEFORE) if p.name == "add_norm") + 1])
    return gm


@pytest.mark.parametrize(("name", "op", "count"), [("gemma2", "gs.norm_add_rms_norm", 8), ("olmo2", "gs.norm_add", 7)])
def test_norm_add_and_next_norm_become_one_op(name: str, op: str, count: int) -> None:
    gm = prepared(name)
    reports, _ = apply(gm, norm_sandwich.PASS)
    assert reports[0].matches == 8 and not reports[0].refusals
    assert ops(gm).count(op) == count
    again, _ = apply(gm, norm_sandwich.PASS)
    assert again[0].matches == 0


def test_a_post_norm_with_another_reader_is_left_alone() -> None:
    gm = prepared("olmo2")
    add = next(n for n in gm.graph.nodes if is_add(n) and any(is_gs(a, "rms_norm") for a in n.args))
    post = next(a for a in add.args if is_gs(a, "rms_norm"))
    with gm.graph.inserting_after(add):
        extra = gm.graph.call_function(torch.ops.aten.add.Tensor, (add, post))
        extra.meta["val"] = add.meta["val"]
    add.replace_all_uses_with(extra, delete_user_cb=lambda user: user is not extra)
    reports, _ = apply(gm, norm_sandwich.PASS)
    assert any("used elsewhere" in r.reason for r in reports[0].refusals)


def test_norms_that_treat_their_weights_differently_are_left_alone() -> None:
    gm = prepared("gemma2")
    root = next(n for n in gm.graph.nodes if is_gs(n, "add_rms_norm") and is_gs(n.args[0], "rms_norm"))
    root.args = (*root.args[:4], 0.0, root.args[5])
    reports, _ = apply(gm, norm_sandwich.PASS)
    assert any("treat their weights differently" in r.reason for r in reports[0].refusals)
    assert reports[0].matches == 7
