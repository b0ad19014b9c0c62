"""From a meta model to a plan: capture, prove, lift, repeat the layers, fuse, lower."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import fx, nn

from graphserve.compiler.canonicalize import canonicalize
from graphserve.compiler.capture import capture, register_interfaces
from graphserve.compiler.layers import LayerStack, find_layers, marked, repeat_layers, why_not_repeatable
from graphserve.compiler.lowering import Lowering, dtype_name
from graphserve.compiler.pipeline import FUSE, LIFT, PassReport, run_pipeline
from graphserve.compiler.rowwise import check_rowwise
from graphserve.errors import UnsupportedModelError
from graphserve.passes.context import PassContext
from graphserve.plan.schema import CacheGroup, Launch, Plan, TensorSpec, WeightSpec

logger = logging.getLogger(__name__)


@dataclass
class BuildResult:
    """A plan and what making it showed.

    Attributes:
        constants: values the plan's ``buffer`` weights take: name → CPU tensor.
        graph: the final L2 graph.
        stack: how layers were grouped; None if the model has no recognisable stack.
        notes: sentences for the user, such as why layers were traced at full depth.
        seconds: wall time of each phase.
    """

    plan: Plan
    constants: dict[str, torch.Tensor]
    graph: fx.GraphModule
    stack: LayerStack | None
    reports: list[PassReport]
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def build_plan(
    model: nn.Module,
    max_model_len: int,
    buffers: dict[str, torch.Tensor],
    *,
    full_depth: bool = False,
    progress: Callable[[str], None] | None = None,
) -> BuildResult:
    """Compile ``model`` into a plan.

    Args:
        model: a causal LM on the meta device, built with our attention and experts implementations.
        max_model_len: longest context a request may reach; position tables have this many rows.
        buffers: values of the model's non-persistent buffers (inv_freq and the like), CPU.
        full_depth: trace every layer, even if layers repeat.
        progress: called with the name of each phase as it starts.

    Raises:
        UnsupportedModelError: the model computes something graphserve refuses, with op and module.
        CompileError: a pass or the lowering failed (a bug).
    """
    register_interfaces()
    seconds: dict[str, float] = {}
    notes: list[str] = []
    phase = _PhaseTimer(seconds, progress)
    with phase("capture"):
        gm, stack = _capture_stack(model, full_depth, notes)
        constants = canonicalize(gm)
        check_rowwise(gm)
        _check_attention_count(gm, model, stack)
    ctx = PassContext(gm, max_model_len)
    with phase("lift"):
        reports = run_pipeline(gm, ctx, LIFT)
    with phase("repeat"):
        if stack is not None:
            gm = repeat_layers(gm, stack)
            ctx.gm = gm
    with phase("fuse"):
        reports += run_pipeline(gm, ctx, FUSE)
    with phase("lower"):
        plan = _lower(gm, ctx, model, max_model_len, constants | buffers)
    plan.passes = [msgspec.to_builtins(r) for r in reports]
    used = {name for spec in plan.weights.values() if spec.op == "buffer" for name in spec.args}
    values = {name: value for name, value in (constants | buffers).items() if name in used}
    return BuildResult(plan, values, gm, stack, reports, notes, seconds)


class _PhaseTimer:
    def __init__(self, seconds: dict[str, float], progress: Callable[[str], None] | None) -> None:
        self._seconds, self._progress = seconds, progress

    def __call__(self, name: str) -> _PhaseTimer:
        self._name = name
        return self

    def __enter__(self) -> None:
        if self._progress is not None:
            self._progress(self._name)
        self._start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._start


def _capture_stack(model: nn.Module, full_depth: bool, notes: list[str]) -> tuple[fx.GraphModule, LayerStack | None]:
    """Trace the representative layers; at full depth when they cannot stand for the rest."""
    names = {id(t): n for n, t in (*model.named_buffers(), *model.named_parameters())}
    stack = find_layers(model, full_depth)
    if stack is None:
        notes.append("no stack of layers recognised: the model is traced whole")
        return capture(model, names), None
    if stack.is_reduced:
        with marked(model, stack):
            gm = capture(model, names)
        reason = why_not_repeatable(gm, stack)
        if reason is None:
            return gm, stack
        notes.append(f"traced at full depth: {reason}")
        stack = find_layers(model, full_depth=True)
        assert stack is not None
    with marked(model, stack):
        gm = capture(model, names)
    reason = why_not_repeatable(gm, stack)
    if reason is None:
        return gm, stack
    notes.append(f"layers are not separable: {reason}")
    return capture(model, names), None


def _check_attention_count(gm: fx.GraphModule, model: nn.Module, stack: LayerStack | None) -> None:
    """Each layer with an attention module must show in the graph, or something of it was lost."""
    nodes = [n for n in gm.graph.nodes if n.target is torch.ops.gs.attention_trace.default]
    expected = len(stack.traced) if stack is not None else model.config.get_text_config().num_hidden_layers
    if len(nodes) != expected:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the graph has {len(nodes)} attention nodes where the config's layers give "
            f"{expected}: layers without attention, or attention outside transformers' AttentionInterface"
        )


def _lower(
    gm: fx.GraphModule, ctx: PassContext, model: nn.Module, max_model_len: int, constants: dict[str, torch.Tensor]
) -> Plan:
    inputs = {n.meta["gs_input"]: n for n in gm.graph.nodes if n.op == "placeholder" and "gs_input" in n.meta}
    tokens = inputs["input_ids"].meta["val"].shape[1].node.expr
    rows = inputs["logits_indices"].meta["val"].shape[0].node.expr
    lowering = Lowering(tokens, rows)
    init: list[Launch] = []
    weights: dict[str, WeightSpec] = {}
    # Init graphs first: they may read weights that the main graph does not.
    for name, graph in ctx.init_graphs.items():
        init += _lower_init(name, graph, weights, ctx, constants)
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        if "gs_weight" in node.meta:
            name = node.meta["gs_weight"]
            if node.users or name in ctx.init_graphs:
                weights[name] = _weight_spec(name, node, ctx, constants)
                lowering.add_input(node, name)
        elif node.users:
            lowering.add_opaque_input(node, node.meta["gs_input"])
    output = lowering.lower(gm.graph)
    config = model.config.get_text_config()
    return Plan(
        model={
            "architecture": type(model).__name__,
            "model_type": config.model_type,
            "vocab_size": int(output.meta["val"].shape[-1]),
            "num_layers": config.num_hidden_layers,
            "max_model_len": max_model_len,
            "dtype": dtype_name(output.meta["val"].dtype),
        },
        launches=lowering.launches,
        init=init,
        buffers=lowering.buffers,
        weights=weights,
        cache_layers=list(ctx.cache_layers),
        cache_groups=[
            CacheGroup(tuple(layers), window, chunk) for (window, chunk), layers in ctx.cache_groups.items()
        ],
        output=lowering.value_name(output),
        passes=[],
    )


def _weight_spec(name: str, node: fx.Node, ctx: PassContext, constants: dict[str, torch.Tensor]) -> WeightSpec:
    value = node.meta["val"]
    spec = TensorSpec(tuple(int(d) for d in value.shape), dtype_name(value.dtype))
    if name in ctx.init_graphs:
        return WeightSpec(spec, "init", ())
    if name in ctx.weight_recipes:
        op, names, dim = ctx.weight_recipes[name]
        return WeightSpec(spec, op, tuple(names), dim)  # type: ignore[arg-type]
    if name in constants:
        return WeightSpec(spec, "buffer", (name,))
    return WeightSpec(spec, "param", (name,))


def _lower_init(
    name: str, gm: fx.GraphModule, weights: dict[str, WeightSpec], ctx: PassContext, constants: dict[str, torch.Tensor]
) -> list[Launch]:
    positions: Any = next(n for n in gm.graph.nodes if n.meta.get("gs_input") == "positions")
    lowering = Lowering(positions.meta["val"].shape[1].node.expr, None, prefix=f"{name}/")
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        if "gs_weight" in node.meta:
            weights.setdefault(node.meta["gs_weight"], _weight_spec(node.meta["gs_weight"], node, ctx, constants))
            lowering.add_input(node, node.meta["gs_weight"])
        else:
            lowering.add_input(node, node.meta["gs_input"])
    output = lowering.value_name(lowering.lower(gm.graph))
    last = lowering.launches[-1]
    assert last.outputs == (output,)
    return [*lowering.launches[:-1], msgspec.structs.replace(last, outputs=(name,))]
