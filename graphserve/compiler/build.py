"""From a meta model to a plan: capture, prove, lift, repeat the layers, fuse, lower."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import torch
from torch import fx

from graphserve import plugins
from graphserve.compiler.canonicalize import canonicalize
from graphserve.compiler.capture import capture, register_interfaces
from graphserve.compiler.layers import (
    LayerStack,
    drop_markers,
    find_layers,
    marked,
    number_layers,
    regions,
    repeat_layers,
    why_not_repeatable,
)
from graphserve.compiler.lowering import Lowering, dtype_name
from graphserve.compiler.pipeline import LIFT, PassReport, Refusal, Site, fuse_passes, run_pipeline
from graphserve.compiler.refusals import refuse_before_trace
from graphserve.compiler.rowwise import check_rowwise
from graphserve.errors import UnsupportedModelError
from graphserve.passes.base import Pass
from graphserve.passes.context import PassContext, WeightRecipe
from graphserve.plan.schema import CacheGroup, Launch, Plan, TensorSpec, WeightPart, WeightSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item", Site, Refusal)


@dataclass
class BuildResult:
    """A plan and what making it showed.

    Attributes:
        constants: values that the plan's ``constant`` weights take: name → CPU tensor.
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
    model: PreTrainedModel,
    max_model_len: int,
    buffers: dict[str, torch.Tensor],
    *,
    full_depth: bool = False,
    quantization: str | None = None,
    progress: Callable[[str], None] | None = None,
    dump_dir: Path | None = None,
    after_pass: Callable[[Pass, PassContext], None] | None = None,
) -> BuildResult:
    """Compile ``model`` into a plan.

    Args:
        model: a causal LM on the meta device, built with our attention and experts implementations.
        max_model_len: longest context a request may reach; position tables have this many rows.
        buffers: values of the model's non-persistent buffers (inv_freq and the like), CPU.
        full_depth: trace every layer, even if layers repeat.
        quantization: scheme of the linear layers, a key of ``passes.quantize_linears.SCHEMES``, None for none.
        progress: called with the name of each phase as it starts.
        dump_dir: the graph before and after each pass is written to ``lift/`` and ``fuse/`` there.
        after_pass: called after each pass with the graph as it left it.

    Raises:
        UnsupportedModelError: the model computes something graphserve refuses, with op and module.
        CompileError: a pass or the lowering failed (a bug).
    """
    register_interfaces()
    seconds: dict[str, float] = {}
    notes: list[str] = []
    phase = _PhaseTimer(seconds, progress)
    with phase("capture"):
        gm, constants, stack = _capture_stack(model, full_depth, notes)
    with phase("prove"):
        check_rowwise(gm)
        _check_attention(gm, model, stack)
    ctx = PassContext(gm, max_model_len)
    with phase("lift"):
        reports = run_pipeline(gm, ctx, LIFT, dump_dir and dump_dir / "lift", after_pass)
    with phase("repeat"):
        if stack is not None:
            gm = repeat_layers(gm, stack)
            reports = [_repeat_report(report, stack) for report in reports]
            lifted, ctx = ctx, PassContext(gm, max_model_len)
            ctx.weight_recipes |= _repeat_recipes(lifted.weight_recipes, stack)
    with phase("fuse"):
        fuse = fuse_passes(quantization) + tuple(plugins.load(plugins.PASSES, Pass))
        reports += run_pipeline(gm, ctx, fuse, dump_dir and dump_dir / "fuse", after_pass)
    with phase("lower"):
        plan = _lower(gm, ctx, model, max_model_len, constants | buffers)
    plan.passes = [msgspec.to_builtins(r) for r in reports]
    wanted = {name for name, weight in plan.weights.items() if weight.source == "constant"}
    values = {name: value for name, value in (constants | buffers).items() if name in wanted}
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


def _capture_stack(
    model: PreTrainedModel, full_depth: bool, notes: list[str]
) -> tuple[fx.GraphModule, dict[str, torch.Tensor], LayerStack | None]:
    """Trace the representative layers, or every layer when they cannot stand for the rest: graph, constants, layers."""
    names = {id(t): n for n, t in (*model.named_buffers(), *model.named_parameters())}
    stack = find_layers(model, full_depth)
    refuse_before_trace(model, stack)
    if stack is None:
        notes.append("no stack of layers recognised: the model is traced whole")
        return *_capture_canonical(model, names), None
    gm, constants = _capture_marked(model, names, stack)
    reason = why_not_repeatable(gm, stack)
    if reason is not None and stack.is_reduced:
        notes.append(f"traced at full depth: {reason}")
        stack = find_layers(model, full_depth=True)
        assert stack is not None
        gm, constants = _capture_marked(model, names, stack)
        reason = why_not_repeatable(gm, stack)
    if reason is None:
        return gm, constants, stack
    notes.append(f"layers are not separable: {reason}")
    drop_markers(gm)
    return gm, constants, None


def _capture_marked(
    model: PreTrainedModel, names: dict[int, str], stack: LayerStack
) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    with marked(model, stack):
        gm, constants = _capture_canonical(model, names)
    number_layers(gm, stack)
    return gm, constants


def _capture_canonical(model: PreTrainedModel, names: dict[int, str]) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    gm = capture(model, names)
    return gm, canonicalize(gm)


def _repeat_recipes(recipes: dict[str, WeightRecipe], stack: LayerStack) -> dict[str, WeightRecipe]:
    """Recipes of the traced layers' weights, for every layer they stand for."""
    repeated = dict(recipes)
    for layer in range(stack.depth):
        old, new = f"{stack.path}.{stack.representative(layer)}.", f"{stack.path}.{layer}."
        for name, (op, sources, dim) in recipes.items():
            if name.startswith(old):
                renamed = [new + s.removeprefix(old) if s.startswith(old) else s for s in sources]
                repeated[new + name.removeprefix(old)] = (op, renamed, dim)
    return repeated


def _repeat_report(report: PassReport, stack: LayerStack) -> PassReport:
    """A report on the traced layers as one on all layers that they stand for."""
    stands_for: dict[int | None, list[int]] = defaultdict(list)
    for layer in range(stack.depth):
        stands_for[stack.representative(layer)].append(layer)

    def repeated(items: tuple[_Item, ...]) -> tuple[_Item, ...]:
        found: list[_Item] = []
        for item in items:
            path = f"{stack.path}.{item.layer}"
            for layer in stands_for.get(item.layer, [item.layer]):
                module = item.module.replace(path, f"{stack.path}.{layer}", 1) if layer is not None else item.module
                found.append(msgspec.structs.replace(item, module=module, layer=layer))
        return tuple(found)

    sites = repeated(report.sites)
    return msgspec.structs.replace(report, matches=len(sites), sites=sites, refusals=repeated(report.refusals))


def _check_attention(gm: fx.GraphModule, model: PreTrainedModel, stack: LayerStack | None) -> None:
    """Each layer's attention must show in the graph, or something of the model was lost."""
    if stack is None:
        found = sum(_is_attention(node) for node in gm.graph.nodes)
        expected = model.config.get_text_config().num_hidden_layers
        if found < expected:
            raise UnsupportedModelError(
                f"{type(model).__name__}: the graph has {found} attention nodes where the config says {expected} layers"
            )
        return
    for number, region in regions(gm.graph).items():
        if not any(map(_is_attention, region.nodes)):
            layer = type(model.get_submodule(f"{stack.path}.{number}")).__name__
            raise UnsupportedModelError(f"{stack.path}.{number} ({layer}) ran without attention in the trace")


def _is_attention(node: fx.Node) -> bool:
    return node.target is torch.ops.gs.attention_trace.default


def _lower(
    gm: fx.GraphModule, ctx: PassContext, model: PreTrainedModel, max_model_len: int, constants: dict[str, torch.Tensor]
) -> Plan:
    inputs = {n.meta["gs_input"]: n for n in gm.graph.nodes if n.op == "placeholder" and "gs_input" in n.meta}
    tokens = inputs["input_ids"].meta["val"].shape[1].node.expr
    rows = inputs["logits_indices"].meta["val"].shape[0].node.expr
    lowering = Lowering(tokens, rows)
    init: list[Launch] = []
    weights: dict[str, WeightSpec] = {}
    # Init graphs first: they may read weights that the main graph does not.
    for name, graph in ctx.init_graphs.items():
        init += _lower_init(name, graph, weights, ctx, constants, model)
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        if "gs_weight" in node.meta:
            name = node.meta["gs_weight"]
            if node.users:
                weights[name] = _weight_spec(name, node, ctx, constants, model)
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
            "eos_token_id": getattr(config, "eos_token_id", None),
            "dtype": dtype_name(output.meta["val"].dtype),
        },
        launches=lowering.launches,
        init=init,
        buffers=lowering.buffers,
        weights=weights,
        cache_layers=list(ctx.cache_layers),
        cache_groups=[CacheGroup(tuple(layers), window, chunk) for (window, chunk), layers in ctx.cache_groups.items()],
        outputs=(lowering.value_name(output),),
        passes=[],
    )


def _weight_spec(
    name: str, node: fx.Node, ctx: PassContext, known: dict[str, torch.Tensor], model: PreTrainedModel
) -> WeightSpec:
    value = node.meta["val"]
    spec = TensorSpec(tuple(int(d) for d in value.shape), dtype_name(value.dtype))
    if name in ctx.init_graphs:
        return WeightSpec(spec, "init")
    if name in known:
        return WeightSpec(spec, "constant")
    dim = ctx.weight_recipes[name][2] if name in ctx.weight_recipes else 0
    return WeightSpec(spec, "parameters", tuple(_parts(name, dim, ctx, model)), dim)


def _parts(name: str, dim: int, ctx: PassContext, model: PreTrainedModel) -> list[WeightPart]:
    """The parameters that a weight is joined from, flattened through recipes of recipes."""
    if name not in ctx.weight_recipes:
        shape = _tensor(model, name).shape
        return [WeightPart(name, shape[dim] if shape else 1)]
    op, names, _ = ctx.weight_recipes[name]
    if op == "transpose":
        return [WeightPart(names[0], _tensor(model, names[0]).shape[1 - dim], is_transposed=True)]
    return [part for source in names for part in _parts(source, dim, ctx, model)]


def _tensor(model: PreTrainedModel, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _lower_init(
    name: str,
    gm: fx.GraphModule,
    weights: dict[str, WeightSpec],
    ctx: PassContext,
    known: dict[str, torch.Tensor],
    model: PreTrainedModel,
) -> list[Launch]:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    lowering = Lowering(None, None, prefix=f"{name}/")  # positions are [1, max_model_len]: every size is known
    for node in placeholders:
        if "gs_weight" in node.meta:
            weight = node.meta["gs_weight"]
            weights.setdefault(weight, _weight_spec(weight, node, ctx, known, model))
            lowering.add_input(node, weight)
        else:
            lowering.add_input(node, node.meta["gs_input"])
    output = lowering.value_name(lowering.lower(gm.graph))
    last = lowering.launches[-1]
    assert last.outputs == (output,)
    return [*lowering.launches[:-1], msgspec.structs.replace(last, outputs=(name,))]
