"""A user's own graph → a launch plan: trace to ATen, apply the passes that need nothing of serving, lower.

Unlike a language model's plan it has no weights: parameters are inputs like any others, read where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphserve.compiler.canonicalize import canonicalize
from graphserve.compiler.capture import to_aten
from graphserve.compiler.lowering import Lowering
from graphserve.compiler.pipeline import run_pipeline
from graphserve.errors import UnsupportedModelError
from graphserve.kernels import register_all
from graphserve.passes import (
    activation,
    add_norm,
    canonical_forms,
    common_subexpressions,
    functionalize,
    glu,
    layer_norm,
    linear,
    no_ops,
    norm_sandwich,
    pointwise_groups,
    rms_norm,
)
from graphserve.passes.base import Pass
from graphserve.passes.context import PassContext
from graphserve.passes.match import is_write
from graphserve.plan.module_plan import ModulePlan, Output
from graphserve.plan.schema import Plan, TensorSpec

aten = torch.ops.aten

# Their schemas do not say that running statistics (argument 3 and 4) are written when argument 5 is true.
_STATISTICS = {aten.batch_norm, aten.instance_norm, aten.native_batch_norm, aten.cudnn_batch_norm}

# No merged linears: their weights are copies, which a later update of a parameter would not reach. No embedding:
# torch's own checks the indices, which the generated gather does not. The rest of the full list is about serving.
PASSES: tuple[Pass, ...] = (
    functionalize.PASS,  # first: every later pass reads the graph as mathematics
    canonical_forms.PASS,
    no_ops.PASS,
    common_subexpressions.PASS,  # before patterns: they compare operands by identity
    layer_norm.PASS,  # before rms_norm, which would see the root mean square of the centred values
    rms_norm.PASS,
    linear.PASS,
    activation.PASS,
    glu.PASS,  # after activation: it gates what that pass found
    no_ops.PASS,
    common_subexpressions.PASS,
    add_norm.PASS,
    norm_sandwich.PASS,  # after add_norm: it takes in the norm before the add
    pointwise_groups.PASS,  # last: what is left for it nobody else wanted
)


def build_module_plan(gm: fx.GraphModule, values: Sequence[Any]) -> ModulePlan:
    """Compile a Dynamo graph.

    Args:
        gm: the graph; its placeholders take ``values``.
        values: fake tensors of one mode, numbers, or sizes with at most one symbol.

    Raises:
        UnsupportedModelError: the graph writes into its inputs, shares memory between results, or does something else
            that a plan cannot say.
        CompileError: a size is not affine in the symbol, or a pass failed.
    """
    register_all()
    symbol = _symbol(values)
    aten_graph, _ = to_aten(gm, values)
    _refuse(aten_graph, values)
    outputs = [_shared_form(item) for item in _results(aten_graph)]
    placeholders = [n for n in aten_graph.graph.nodes if n.op == "placeholder"]
    for node in placeholders:
        if isinstance(node.meta["val"], torch.Tensor):
            node.meta["gs_weight"] = node.name
    _drop_grad_modes(aten_graph)
    constants = canonicalize(aten_graph)
    ctx = PassContext(aten_graph, max_model_len=1)
    run_pipeline(aten_graph, ctx, PASSES)
    for node in aten_graph.graph.nodes:
        if is_write(node):
            raise UnsupportedModelError(f"{node.format_node()} writes into memory that other values share")
    _transposes_as_views(ctx)
    _keep_checked_gathers(aten_graph)
    return _lower(aten_graph, placeholders, values, symbol, constants, outputs)


def _symbol(values: Sequence[Any]) -> Any:
    """The one symbol of all sizes, or None.

    Raises:
        UnsupportedModelError: there are more.
    """
    sizes = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else (v,))]
    symbols = {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
    if len(symbols) > 1:
        raise UnsupportedModelError(f"{len(symbols)} sizes vary independently of one another")
    return next(iter(symbols), None)


def _results(gm: fx.GraphModule) -> list[Any]:
    (results,) = gm.graph.output_node().args
    return list(results) if isinstance(results, (list, tuple)) else [results]


def _refuse(gm: fx.GraphModule, values: Sequence[Any]) -> None:
    """Names what a plan would get wrong: other devices, and results that share memory."""
    device = next(v.device for v in values if isinstance(v, torch.Tensor))
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device != device and value.dim() > 0:
            raise UnsupportedModelError(f"{node.name} is on {value.device}, the module's first tensor on {device}")
    seen = {_storage(v) for v in values if isinstance(v, torch.Tensor)}
    for node in gm.graph.nodes:
        if getattr(node.target, "overloadpacket", None) in _STATISTICS and node.args[3] is not None and node.args[5]:
            raise UnsupportedModelError(f"{node.target} updates running statistics")
        if is_write(node):
            written = [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
            if written and _storage(written[0]) in seen:
                raise UnsupportedModelError(f"{node.target} writes into an argument, parameter or buffer")
    for node in _results(gm):
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, torch.Tensor):
            if _storage(value) in seen:
                raise UnsupportedModelError(f"result {node.name} shares memory with an argument or another result")
            seen.add(_storage(value))


def _storage(value: torch.Tensor) -> int:
    """The same number for two tensors exactly when they share memory."""
    return value.untyped_storage()._cdata


def _shared_form(item: Any) -> Any:
    """What a caller sees of a result: the fake value of a node, or the constant itself."""
    return item.meta.get("val") if isinstance(item, fx.Node) else item


def _drop_grad_modes(gm: fx.GraphModule) -> None:
    """Nothing is differentiated, so switching gradients on and off has no effect."""
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            gm.graph.erase_node(node)


def _transposes_as_views(ctx: PassContext) -> None:
    """A weight that a pass wants transposed is a view here, so that it stays the parameter itself."""
    graph = ctx.graph
    sources = {n.meta["gs_weight"]: n for n in graph.nodes if n.op == "placeholder" and "gs_weight" in n.meta}
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for name, (op, (source, *_), _dim) in ctx.weight_recipes.items():
        assert op == "transpose", op
        node = sources[name]
        with graph.inserting_before(first):
            node.replace_all_uses_with(ctx.emit(aten.transpose.int, sources[source], 0, 1))
        graph.erase_node(node)


def _keep_checked_gathers(gm: fx.GraphModule) -> None:
    """Spells ``index_select`` so that no kernel takes it: torch checks the indices, a serving kernel trusts them."""
    for node in gm.graph.nodes:
        if node.target is aten.index_select.default:
            x, dim, index = node.args
            node.args = (x, dim % x.meta["val"].dim() - x.meta["val"].dim(), index)


def _lower(
    gm: fx.GraphModule,
    placeholders: list[fx.Node],
    values: Sequence[Any],
    symbol: Any,
    constants: dict[str, torch.Tensor],
    results: list[Any],
) -> ModulePlan:
    lowering = Lowering(symbol, None)
    inputs: dict[str, TensorSpec] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.users and "gs_weight" in node.meta:
            name = node.meta["gs_weight"]
            lowering.add_input(node, name)
            inputs[name] = lowering.tensor_spec(node.meta["val"])
    lowering.lower(gm.graph)
    outputs = [_output(value, lowering) for value in results]
    names = [lowering.value_name(n) for n, o in zip(_results(gm), outputs, strict=True) if o is not None and o.dtype]
    plan = Plan(
        model={},
        launches=lowering.launches,
        init=[],
        buffers=lowering.buffers,
        weights={},
        cache_layers=[],
        cache_groups=[],
        outputs=tuple(names),
        passes=[],
        inputs=inputs,
    )
    arguments = [node.meta.get("gs_weight") if node.users else None for node in placeholders]
    return ModulePlan(plan, arguments, constants, outputs, _size_argument(values, symbol))


def _output(value: Any, lowering: Lowering) -> Output | None:
    if isinstance(value, torch.Tensor):
        # A broadcast result has several elements in one place; nothing could be copied into that form.
        strides = value.contiguous().stride() if 0 in value.stride() else value.stride()
        return Output(tuple(map(lowering.affine, value.shape)), tuple(map(lowering.affine, strides)), value.dtype)
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return Output(number=lowering.affine(value))
    if value is None:
        return None
    raise UnsupportedModelError(f"a result is a {type(value).__name__}: tensors, sizes and None can be returned")


def _size_argument(values: Sequence[Any], symbol: Any) -> tuple[int, int] | None:
    if symbol is None:
        return None
    for position, value in enumerate(values):
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                return position, dim
    raise UnsupportedModelError(f"no argument has the size {symbol} itself")
