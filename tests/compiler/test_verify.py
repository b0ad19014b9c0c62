"""explain --verify: the graph after each pass keeps the logits, and a pass that does not is named."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphserve.compiler import build
from graphserve.compiler.capture import register_interfaces
from graphserve.compiler.verify import Verification, verify
from graphserve.models.meta_model import build_meta_model
from graphserve.models.rope import bake_rope
from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, is_gs
from tests.tiny_models import checkpoint_tensors, tiny_config, tiny_model


def verified(name: str) -> Verification:
    register_interfaces()
    config = tiny_config(name)
    eager = tiny_model(config)
    meta = build_meta_model(config, torch.float32)
    bake_rope(meta, 64)
    return verify(config, checkpoint_tensors(eager), eager, meta)


@pytest.mark.parametrize(
    "name", ["gemma2", "llama4_text", *(pytest.param(n, marks=pytest.mark.full) for n in ("gpt_oss", "deepseek_v3"))]
)
def test_every_pass_keeps_the_logits(name: str) -> None:
    result = verified(name)
    assert result.first_departure is None
    assert result.stages[-1].name == "plan" and len(result.stages) > 20
    assert all(stage.error < 1e-4 for stage in result.stages)


def _is_gate(node: fx.Node) -> Match | None:
    return Match(node, (node,)) if is_gs(node, "act_mul") else None


def _forget_the_gate(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    gate, up, _ = match.root.args
    return {match.root: ctx.emit(aten.mul.Tensor, gate, up)}


def test_the_first_pass_that_changes_the_logits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Pass("forgets_the_gate", _forget_the_gate, pattern=_is_gate)
    monkeypatch.setattr(build.plugins, "load", lambda group, kind: [bad] if kind is Pass else [])
    result = verified("llama")
    assert result.first_departure == "forgets_the_gate"
    assert [s.name for s in result.stages if not s.is_within] == ["forgets_the_gate"], "the plan repeats its logits"
