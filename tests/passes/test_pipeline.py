"""The runner: reports, dumps, and that a wrong pass is named and never skipped."""

from pathlib import Path

import msgspec
import pytest
import torch

from graphserve.compiler.pipeline import PIPELINE, PassReport, run_pipeline
from graphserve.errors import CompileError
from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, is_op
from tests.passes.graphs import TOKENS, apply, graph_of, model_graph

X = {"x": torch.randn(1, TOKENS, 8)}


def _graph() -> torch.fx.GraphModule:
    return graph_of(lambda x: torch.exp(x) + 1, X)


def _exp(node: torch.fx.Node) -> Match | None:
    return Match(node, (node,)) if is_op(node, aten.exp.default) else None


def _replace_by(make) -> Pass:  # type: ignore[no-untyped-def]
    return Pass("faulty", lambda match, ctx: {match.root: make(match, ctx)}, pattern=_exp)


def test_a_pass_that_raises_is_named_with_the_node() -> None:
    with pytest.raises(CompileError, match="pass faulty failed at node exp"):
        apply(_graph(), _replace_by(lambda match, ctx: 1 / 0))


def test_a_pass_that_changes_the_dtype_is_stopped() -> None:
    wrong = _replace_by(lambda match, ctx: ctx.emit(aten.to.dtype, match.root.args[0], torch.bfloat16))
    with pytest.raises(CompileError, match="bfloat16"):
        apply(_graph(), wrong)


def test_a_pass_that_changes_the_shape_is_stopped() -> None:
    wrong = _replace_by(lambda match, ctx: ctx.emit(aten.slice.Tensor, match.root.args[0], 2, 0, 4))
    with pytest.raises(CompileError, match="was torch.float32"):
        apply(_graph(), wrong)


def test_a_pass_that_breaks_the_order_of_nodes_is_stopped() -> None:
    def late(match: Match, ctx: PassContext) -> torch.fx.Node:
        with ctx.graph.inserting_before(next(n for n in ctx.graph.nodes if n.op == "output")):
            return ctx.emit(aten.sin.default, match.root.args[0])

    with pytest.raises(CompileError, match="after its last match"):
        apply(_graph(), _replace_by(late))


def test_a_refusal_is_reported_and_leaves_the_graph() -> None:
    wary = Pass("wary", lambda match, ctx: {}, pattern=_exp, check=lambda match, ctx: "it is Tuesday")
    gm = _graph()
    before = gm.code
    report = apply(gm, wary)[0][0]
    assert report.matches == 0 and report.refusals[0].reason == "it is Tuesday"
    assert report.refusals[0].node == "exp" and gm.code == before


def test_new_nodes_name_the_nodes_they_stand_for() -> None:
    gm = _graph()
    apply(gm, _replace_by(lambda match, ctx: ctx.emit(aten.cos.default, match.root.args[0])))
    assert next(n for n in gm.graph.nodes if is_op(n, aten.cos.default)).meta["gs_sources"] == ("exp",)


def test_reports_are_json_and_name_layers_and_modules() -> None:
    gm = model_graph("llama")
    reports = run_pipeline(gm, PassContext(gm, 64))
    assert msgspec.json.decode(msgspec.json.encode(reports), type=list[PassReport]) == reports
    merged = next(r for r in reports if r.name == "merge_linears")
    assert [site.module for site in merged.sites[:2]] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert all(r.seconds >= 0 for r in reports) and [r.name for r in reports] == [p.name for p in PIPELINE]


def test_a_dump_shows_the_graph_around_each_pass(tmp_path: Path) -> None:
    gm = _graph()
    cos = _replace_by(lambda match, ctx: ctx.emit(aten.cos.default, match.root.args[0]))
    run_pipeline(gm, PassContext(gm, 64), (cos,), dump_dir=tmp_path)
    assert "aten.exp" in (tmp_path / "00_faulty.before.txt").read_text()
    after = (tmp_path / "00_faulty.after.txt").read_text()
    assert "aten.exp" not in after and "torch.float32 [1, s" in after


def test_every_pass_documents_itself() -> None:
    import sys

    modules = {p.replacement.__module__: p for p in PIPELINE}
    for module, item in modules.items():
        text = sys.modules[module].__doc__ or ""
        assert "→" in text and ("egal" in text), item.name
        assert ("Exact" in text) == (item.tier == "exact"), item.name
        assert module.rpartition(".")[2] == item.name
