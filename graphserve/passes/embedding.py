"""Token and position embeddings become ``gs.embedding``.

    aten.embedding(weight, ids, padding_idx)   →  gs.embedding(ids, weight)

Legal always: ATen itself demands a table of two dimensions, and ``padding_idx`` and the other arguments matter for
gradients only. Exact.
"""

from __future__ import annotations

import torch
from torch import fx

from graphserve.passes.base import Match, Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import aten, is_op


def pattern(node: fx.Node) -> Match | None:
    return Match(node, (node,)) if is_op(node, aten.embedding.default) else None


def replacement(match: Match, ctx: PassContext) -> dict[fx.Node, fx.Node]:
    weight, ids = match.root.args[:2]
    return {match.root: ctx.emit(torch.ops.gs.embedding.default, ids, weight)}


PASS = Pass("embedding", replacement, pattern=pattern)
