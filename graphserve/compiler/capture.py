"""Capture: an unmodified `transformers` model on the meta device → one ATen FX graph (L1).

``torch.compile`` (Dynamo) gives a graph of the model's Python with the token dimension symbolic; ``make_fx`` lowers it
to ATen before dispatch, with ``aten.linear`` whole and each parameter a placeholder. Attention and experts arrive as
single nodes because we register our own functions in `transformers`' interfaces.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphserve.compiler.attention_rule import AttentionRule, decode_rule, reconcile, recorded_masks
from graphserve.compiler.experts import describe_experts, register_experts
from graphserve.compiler.refusals import MARKER, trace_failure_reason
from graphserve.errors import UnsupportedModelError
from graphserve.kernels import register_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

IMPLEMENTATION = "graphserve"  # the name under which our functions stand in transformers' interfaces

# Example sizes for the trace: odd primes, so that no model dimension equals them by chance.
_T, _R = 17, 5

_TRACE_LIB = torch.library.Library("gs", "FRAGMENT")
_TRACE_LIB.define(
    "attention_trace(Tensor q, Tensor k, Tensor v, Tensor? sinks, int layer, float scale, int window, int chunk, "
    "float softcap, bool causal) -> Tensor"
)
_TRACE_LIB.define("layer_begin(Tensor x, int layer) -> Tensor")
_TRACE_LIB.define("layer_end(Tensor x, int layer) -> Tensor")


@torch.library.impl(_TRACE_LIB, "attention_trace", "Meta")
def _attention_trace_meta(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
) -> torch.Tensor:  # [B, H, T, D] each → [B, T, Hq, Dv]
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.impl(_TRACE_LIB, "layer_begin", "Meta")
def _layer_begin_meta(x: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.impl(_TRACE_LIB, "layer_end", "Meta")
def _layer_end_meta(x: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.empty_like(x)


# Arguments of the attention call that mean nothing for the result at inference, whatever their value.
_INERT_KWARGS = frozenset(
    {
        *("dropout", "attention_dropout", "training", "deterministic", "num_items_in_batch"),
        *("use_cache", "cache_position", "past_key_value", "past_key_values", "query_length", "layer_idx"),
        *("position_ids", "position_embeddings", "logits_to_keep", "target_dtype"),
        *("return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
    }
)


def graphserve_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for `transformers`: one ``gs.attention_trace`` node per call.

    Args:
        query: [B, Hq, T, Dk]; key: [B, Hkv, T, Dk]; value: [B, Hkv, T, Dv].

    Returns:
        ([B, T, Hq, Dv], None)
    """
    extras = [k for k, v in kwargs.items() if k not in _INERT_KWARGS and v is not None and v is not False]
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    rule: AttentionRule = reconcile(decode_rule(attention_mask), sliding_window, causal, extras)
    if rule.unsupported:
        raise RuntimeError(f"{MARKER}{type(module).__name__}: {rule.unsupported}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        layer = getattr(module, "layer_id", -1)
    out = torch.ops.gs.attention_trace(
        query, key, value, s_aux, layer, float(scale), rule.window, rule.chunk, float(softcap or 0.0), rule.causal
    )
    return out, None


def register_interfaces() -> None:
    """Register our attention and experts functions with `transformers` (idempotent)."""
    from transformers import AttentionInterface

    register_all()
    AttentionInterface.register(IMPLEMENTATION, graphserve_attention)
    register_experts(IMPLEMENTATION)


def capture(model: PreTrainedModel, weight_names: dict[int, str] | None = None) -> fx.GraphModule:
    """Trace ``model`` into an L1 graph.

    Args:
        model: a causal LM on the meta device, in eval mode, built with ``attn_implementation="graphserve"``.
        weight_names: ``id(tensor)`` → name of each parameter and buffer; the model's own names by default (needed
            when the model is traced with fewer layers than it has).

    Returns:
        GraphModule with inputs ``input_ids`` [1, T], ``positions`` [1, T], ``logits_indices`` [R] (int64) and one
        placeholder per parameter and buffer used; output ``logits[:, logits_indices]`` [1, R, vocab]. Placeholders
        carry ``meta["gs_input"]`` or ``meta["gs_weight"]``, all nodes ``meta["val"]`` and, where known, path and class
        of their module, ``meta["gs_module"]`` and ``meta["gs_class"]``.

    Raises:
        UnsupportedModelError: the model does not trace to one graph with a free token dimension, and why.
    """
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    takes_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    options = {k: v for k, v in (("use_cache", False), ("return_dict", False)) if k in parameters or takes_kwargs}
    # Given a number of rows (the default), models with shared KV compute the last layers for these rows alone; given
    # indices they compute all of them.
    selects_rows = bool(getattr(model.config.get_text_config(), "num_kv_shared_layers", 0))
    if weight_names is None:
        weight_names = {id(t): n for n, t in (*model.named_buffers(), *model.named_parameters())}
    describe_experts(model)
    captured: dict[str, Any] = {}

    def step(input_ids: torch.Tensor, position_ids: torch.Tensor, logits_indices: torch.Tensor) -> torch.Tensor:
        if selects_rows:
            kept = {**options, "logits_to_keep": logits_indices}
            return model(input_ids=input_ids, position_ids=position_ids, **kept)[0]
        return model(input_ids=input_ids, position_ids=position_ids, **options)[0][:, logits_indices]

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        values = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        captured["graph"], captured["shape_env"] = to_aten(gm, values)
        captured["inputs"] = example_inputs
        return gm.forward

    ids = torch.zeros(1, _T, dtype=torch.int64, device="meta")
    positions = torch.zeros(1, _T, dtype=torch.int64, device="meta")
    indices = torch.zeros(_R, dtype=torch.int64, device="meta")
    torch._dynamo.mark_dynamic(ids, 1)
    torch._dynamo.mark_dynamic(positions, 1)
    torch._dynamo.mark_dynamic(indices, 0)
    torch._dynamo.reset()
    try:
        with torch.no_grad(), recorded_masks(model):
            torch.compile(step, backend=backend, fullgraph=True)(ids, positions, indices)
    except Exception as e:  # isolation boundary: Dynamo raises many kinds; the reason goes to the user
        raise UnsupportedModelError(f"{name} does not trace to one graph: {trace_failure_reason(e)}") from e
    finally:
        torch._dynamo.reset()
    gm: fx.GraphModule = captured["graph"]
    step_inputs = {id(ids): "input_ids", id(positions): "positions", id(indices): "logits_indices"}
    _label_placeholders(gm, captured["inputs"], step_inputs, weight_names, name)
    _check_guards(captured["shape_env"], gm, name)
    return gm


def to_aten(gm: fx.GraphModule, values: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
    """Dynamo's graph → ATen graph before dispatch, and the shape environment of its sizes.

    Args:
        values: one for each placeholder: fake tensors of one mode (those Dynamo left there, say), sizes, numbers.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    fake_mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))
    allowed = fake_mode.allow_non_fake_inputs
    fake_mode.allow_non_fake_inputs = True  # constants that the model's Python makes (torch.tensor(3.0))
    try:
        with torch.no_grad(), fx.traceback.preserve_node_meta():
            aten = make_fx(fx.Interpreter(gm).run, tracing_mode="real", pre_dispatch=True)(*values)
    finally:
        fake_mode.allow_non_fake_inputs = allowed
    for node in aten.graph.nodes:
        node.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
        if stack := node.meta.pop("nn_module_stack", None):
            path, cls = list(stack.values())[-1]
            node.meta["gs_class"] = cls.__name__
            node.meta["gs_module"] = path.removeprefix("L['model']").removeprefix(".") or cls.__name__
    inputs = [n for n in aten.graph.nodes if n.op == "placeholder"]
    for node, source, value in zip(inputs, placeholders, values, strict=True):
        node.meta["val"] = value
        node.meta["dynamo_name"] = source.name
    return aten, fake_mode.shape_env


def _label_placeholders(
    gm: fx.GraphModule, inputs: list[Any], step_inputs: dict[int, str], weight_names: dict[int, str], model: str
) -> None:
    """Name placeholders by what they hold; size symbols become ``sym_size`` of the inputs."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        if id(value) in step_inputs:
            node.meta["gs_input"] = step_inputs[id(value)]
        elif id(value) in weight_names:
            node.meta["gs_weight"] = weight_names[id(value)]
        else:
            raise UnsupportedModelError(f"{model}: captured tensor {node.name} is neither input, parameter nor buffer")
    ids = _input(gm, "input_ids")
    indices = _input(gm, "logits_indices", required=False)
    last = placeholders[-1]
    for node in placeholders:
        if isinstance(node.meta["val"], torch.Tensor):
            continue
        if node.users:
            owner, dim = next(
                (n, d)
                for n in (ids, indices)
                if n is not None
                for d, size in enumerate(n.meta["val"].shape)
                if str(size) == str(node.meta["val"])
            )
            with gm.graph.inserting_after(last):
                size_node = gm.graph.call_function(torch.ops.aten.sym_size.int, (owner, dim))
            size_node.meta["val"] = owner.meta["val"].shape[dim]
            node.replace_all_uses_with(size_node)
        gm.graph.erase_node(node)
    gm.recompile()


def _input(gm: fx.GraphModule, name: str, required: bool = True) -> fx.Node | None:
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.meta.get("gs_input") == name:
            return node
    if required:
        raise UnsupportedModelError(f"the captured graph does not use {name}")
    return None


def _check_guards(shape_env: Any, gm: fx.GraphModule, model: str) -> None:
    """Refuse a graph that is only right for some token counts."""
    ids = _input(gm, "input_ids")
    assert ids is not None
    size = ids.meta["val"].shape[1]
    if not isinstance(size, torch.SymInt):
        raise UnsupportedModelError(f"{model}: the trace is specialised to one token count")
    symbol = size.node.expr
    bad = []
    for guard in shape_env.guards:
        expr = guard.expr
        if symbol not in expr.free_symbols:
            continue
        # A guard that holds for every T from 2 up only says that the trace is general.
        if not all(
            bool(expr.subs(symbol, t)) is True
            for t in (2, 3, 5, 16, 17, 64, 255, 256, 257, 4096, 131072)
            if not expr.subs(symbol, t).free_symbols
        ):
            bad.append(str(expr))
    bounds = shape_env.var_to_range.get(symbol)
    if bounds is not None and bool(bounds.lower > 2 or bounds.upper < 1 << 30):
        bad.append(f"{symbol} in [{bounds.lower}, {bounds.upper}]")
    if bad:
        bad = [re.sub(rf"\b{symbol}\b", "T", text) for text in bad]
        shown = "; ".join(bad[:2])[:200] + (f"; and {len(bad) - 2} more" if len(bad) > 2 else "")
        raise UnsupportedModelError(f"{model}: the trace holds only for some token counts T: {shown}", tuple(bad))


def weight_placeholders(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Parameter or buffer path → its placeholder."""
    return {n.meta["gs_weight"]: n for n in gm.graph.nodes if n.op == "placeholder" and "gs_weight" in n.meta}
