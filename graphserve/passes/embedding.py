"""Token and position embeddings become ``gs.embedding``.

    aten.embedding(weight, ids, padding_idx)   →  gs.embedding(ids, weight)

Legal always: ``padding_idx`` and the other arguments only matter for gradients. Exact.
"""

from __future__ import annotations

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, is_op, rank


def pattern(node: fx.Node) -> Match | None:
    return Match(node, (node,)) if is_op(node, aten.embedding.default) else None


def check(match: Match, ctx: PassContext) -> str | None:
    weight = match.root.args[0]
    assert isinstance(weight, fx.Node)
    return None if rank(weight) == 2 else f"the table has {rank(weight)} dimensions, not 2"


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    weight, ids = match.root.args[:2]
    return {match.root: ctx.emit(torch.ops.gs.embedding.default, ids, weight)}


PASS = Pass("embedding", replacement, pattern=pattern, check=check)
