"""The ordered list of passes, and the runner that applies them: L1 → L2 → fused L2.

The runner counts matches and refusals, times, compares every replaced node's shape and dtype with its replacement's
under fake tensors, erases dead nodes, lints, and can dump the graph before and after each pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import fx

from graphserve.errors import CompileError
from graphserve.passes import (
    activation,
    add_norm,
    attention,
    canonical_forms,
    common_subexpressions,
    dense_experts,
    embedding,
    functionalize,
    glu,
    last_rows,
    layer_norm,
    linear,
    merge_linears,
    no_ops,
    norm_sandwich,
    pointwise_groups,
    position_tables,
    quantize_producers,
    rms_norm,
    rope,
    route,
    row_reshape,
    weight_constants,
)
from graphserve.passes.base import Match, Pass, Tier
from graphserve.passes.context import PassContext
from graphserve.passes.match import is_write, module_path, same_shape
from graphserve.passes.quantize_linears import SCHEMES, quantize_linears

logger = logging.getLogger(__name__)

# On one or two layers of each type, between layer markers: what a layer is made of.
LIFT: tuple[Pass, ...] = (
    functionalize.PASS,  # first: every later pass reads the graph as mathematics
    canonical_forms.PASS,
    no_ops.PASS,
    common_subexpressions.PASS,  # before patterns: they compare operands by identity
    layer_norm.PASS,  # before rms_norm, which would see the root mean square of the centred values
    rms_norm.PASS,
    linear.PASS,
    embedding.PASS,
    activation.PASS,
    glu.PASS,  # after activation: it gates what that pass found
    rope.PASS,
    row_reshape.PASS,  # after the row-wise ops are lifted: it moves reshapes behind them
    no_ops.PASS,  # removes the pairs of reshapes that now meet
    dense_experts.PASS,  # after glu and no_ops: the products of all experts then meet without reshapes between
    route.PASS,  # after dense_experts: it starts at the experts, and reads the router's steps backwards
)

# At full depth, markers gone: what reaches over layers, and what numbers them.
FUSE: tuple[Pass, ...] = (
    common_subexpressions.PASS,
    no_ops.PASS,
    last_rows.PASS,
    merge_linears.PASS,  # before attention: q, k and v shall be columns of one product
    common_subexpressions.PASS,  # rope made the tables of each layer anew: one for all
    position_tables.PASS,
    weight_constants.PASS,  # after position_tables, which takes inv_freq along with the positions
    add_norm.PASS,  # after last_rows, which moves the gather to before the final norm
    norm_sandwich.PASS,  # after add_norm: it takes in the norm before the add
    attention.PASS,  # after position_tables: the fused write reads the tables themselves
    no_ops.PASS,
    common_subexpressions.PASS,
    pointwise_groups.PASS,  # last: what is left for it nobody else wanted
)

PIPELINE = LIFT + FUSE


def fuse_passes(quantization: str | None) -> tuple[Pass, ...]:
    """:data:`FUSE` with the passes of a quantization scheme, if one is given (a key of ``SCHEMES``)."""
    if quantization is None:
        return FUSE
    passes = list(FUSE)
    # After merge_linears, so that siblings share one quantized input; before weight_constants, which quantizes at load.
    passes.insert(passes.index(merge_linears.PASS) + 1, quantize_linears(SCHEMES[quantization]))
    # After add_norm and attention, which it takes in, and the no-ops between attention and its reader.
    passes.insert(passes.index(pointwise_groups.PASS), quantize_producers.PASS)
    return tuple(passes)


class Site(msgspec.Struct, frozen=True):
    """Where a pass matched."""

    module: str
    nodes: tuple[str, ...]
    layer: int | None = None


class Refusal(msgspec.Struct, frozen=True):
    """A match that a pass left alone, and why."""

    node: str
    module: str
    reason: str
    layer: int | None = None


class PassReport(msgspec.Struct, frozen=True):
    """What one pass did. ``tolerance`` is in units of the result dtype's eps times the tensor's largest magnitude."""

    name: str
    tier: Tier
    tolerance: float
    matches: int
    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    seconds: float


def run_pipeline(
    gm: fx.GraphModule,
    ctx: PassContext,
    passes: tuple[Pass, ...] = PIPELINE,
    dump_dir: Path | None = None,
    after_pass: Callable[[Pass, PassContext], None] | None = None,
) -> list[PassReport]:
    """Applies ``passes`` in order to ``gm``, in place.

    Args:
        gm: An L1 graph (see ``compiler/capture.py``), the one ``ctx`` was made for.
        ctx: Receives new inputs, weight recipes, init graphs and cache layers.
        passes: The ordered list.
        dump_dir: When given, ``NN_name.before.txt`` and ``NN_name.after.txt`` are written there for each pass.
        after_pass: Called after each pass, with the graph as it left it.

    Returns:
        One report a pass.

    Raises:
        CompileError: A pass raised, changed a shape or dtype, or left an invalid graph; names pass and node.
    """
    reports = []
    for number, item in enumerate(passes):
        stem = f"{number:02d}_{item.name}"
        _dump(gm, dump_dir, f"{stem}.before.txt")
        report = _run_pass(gm, ctx, item)
        _dump(gm, dump_dir, f"{stem}.after.txt")
        logger.debug("pass %s: %d matches, %d refusals", item.name, report.matches, len(report.refusals))
        reports.append(report)
        if after_pass is not None:
            after_pass(item, ctx)
    gm.recompile()
    return reports


def _run_pass(gm: fx.GraphModule, ctx: PassContext, item: Pass) -> PassReport:
    start = time.perf_counter()
    sites: list[Site] = []
    refusals: list[Refusal] = []
    current: fx.Node | None = None
    try:
        for match in item.matches(gm.graph):
            current = match.root
            module, layer = module_path(match.root, *match.nodes), match.root.meta.get("gs_layer")
            if (reason := item.check(match, ctx)) is not None:
                refusals.append(Refusal(match.root.name, module, reason, layer))
                continue
            sites.append(Site(module, tuple(node.name for node in match.nodes), layer))
            _replace(item, match, ctx)
        current = None
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
    except Exception as error:  # isolation boundary: a pass that raises is named and never skipped
        where = f"at node {current}" if current is not None else "after its last match"
        raise CompileError(f"pass {item.name} failed {where}: {error}") from error
    seconds = time.perf_counter() - start
    return PassReport(item.name, item.tier, item.tolerance, len(sites), tuple(sites), tuple(refusals), seconds)


def _replace(item: Pass, match: Match, ctx: PassContext) -> None:
    with ctx.replacing(match), ctx.graph.inserting_before(match.root):
        replaced = item.replacement(match, ctx)
    for old, new in replaced.items():
        _compare(old, new)
        old.replace_all_uses_with(new)
    _erase_dead(ctx.graph, [*match.nodes, *replaced])


def _compare(old: fx.Node, new: fx.Node) -> None:
    before, after = old.meta["val"], new.meta["val"]
    if not isinstance(after, torch.Tensor):
        raise ValueError(f"{new} replaces {old} but is no tensor")
    if before.dtype != after.dtype or not same_shape(before.shape, after.shape):
        raise ValueError(
            f"{new} is {after.dtype} {list(after.shape)} where {old} was {before.dtype} {list(before.shape)}"
        )


def _erase_dead(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erases those of ``nodes`` that nobody uses, and what was only there for them."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node._erased or node.users or node.op != "call_function" or is_write(node):
            continue
        pending.extend(node.all_input_nodes)
        graph.erase_node(node)


def _dump(gm: fx.GraphModule, dump_dir: Path | None, name: str) -> None:
    if dump_dir is None:
        return
    dump_dir.mkdir(parents=True, exist_ok=True)
    lines = []
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        shown = f"  # {val.dtype} {list(val.shape)}" if isinstance(val, torch.Tensor) else ""
        lines.append(f"{node.format_node()}{shown}")
    (dump_dir / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
