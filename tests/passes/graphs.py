"""Builds small and whole-model L1 graphs for the pass tests, and runs rewritten graphs on real tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from transformers import AutoModelForCausalLM

from graphserve.compiler.capture import capture, register_interfaces
from graphserve.compiler.pipeline import PassReport, run_pipeline
from graphserve.passes.base import Pass
from graphserve.passes.context import PassContext
from tests.tiny_models import tiny_config, tiny_model

TOKENS = 17  # no other size in a test graph equals it, so it marks the token dimension
MAX_LEN = 64
BLOCK = 4

register_interfaces()


def graph_of(
    function: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor] | None = None,
) -> fx.GraphModule:
    """``function(*inputs, *weights)`` traced as a model is: ATen before dispatch, sizes equal to TOKENS symbolic."""
    weights = weights or {}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    tokens: torch.Tensor | None = None
    for name, tensor in (inputs | weights).items():
        dynamic = [DimDynamic.DUCK if size == TOKENS else DimDynamic.STATIC for size in tensor.shape]
        context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
        fakes.append(mode.from_tensor(tensor.to("meta"), source=ConstantSource(name), symbolic_context=context))
        tokens = tokens if tokens is not None else fakes[-1]
    with torch.no_grad():
        gm = make_fx(lambda *tensors: function(*tensors), tracing_mode="real", pre_dispatch=True)(*fakes)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, name, fake in zip(placeholders, inputs | weights, fakes, strict=True):
        node.meta.update({"val": fake, "gs_input" if name in inputs else "gs_weight": name})
    return gm


def apply(gm: fx.GraphModule, *passes: Pass) -> tuple[list[PassReport], PassContext]:
    ctx = PassContext(gm, MAX_LEN)
    return run_pipeline(gm, ctx, passes), ctx


def ops(gm: fx.GraphModule) -> list[str]:
    """Names of the called ops, such as ``gs.linear`` and ``aten.add``, in order."""
    return [
        f"{n.target.namespace}.{n.target._opname}"
        for n in gm.graph.nodes
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)
    ]


def run(gm: fx.GraphModule, ctx: PassContext, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The graph's result on real tensors; ``values`` holds inputs and parameters by name.

    Weights made by passes are made here by their recipes and init graphs.
    """
    values = dict(values)
    for name, (kind, sources, dim) in ctx.weight_recipes.items():
        parts = [values[s] for s in sources]
        values[name] = torch.cat(parts, dim) if kind == "concat" else parts[0].t().contiguous()
    for name, init in ctx.init_graphs.items():
        values[name] = interpret(init, values | {"positions": torch.arange(MAX_LEN)[None]})
    return interpret(gm, values)


def interpret(gm: fx.GraphModule, values: dict[str, torch.Tensor]) -> torch.Tensor:
    names = [n.meta.get("gs_input") or n.meta["gs_weight"] for n in gm.graph.nodes if n.op == "placeholder"]
    graph = copy.deepcopy(gm.graph)
    for node in graph.nodes:  # the trace was made on the meta device
        node.kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in node.kwargs.items()}
    with torch.no_grad():
        result = fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(*[values[name] for name in names])
    return result[0] if isinstance(result, (tuple, list)) else result


@cache
def captured(name: str, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """The L1 graph of a tiny model. Shared: :func:`model_graph` gives copies."""
    config = tiny_config(name)
    for part in (config, *(getattr(config, field, None) for field in config.sub_configs)):
        if part is not None:
            part._attn_implementation = part._experts_implementation = "graphserve"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="graphserve", dtype=dtype).eval()
    return capture(model)


def model_graph(name: str, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    gm = captured(name, dtype)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    graph.output(result)
    for old, new in copies.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(nn.Module(), graph)


@cache
def eager(name: str) -> nn.Module:
    return tiny_model(tiny_config(name))


def packed_logits(gm: fx.GraphModule, ctx: PassContext, model: nn.Module, requests: list[list[int]]) -> torch.Tensor:
    """Logits [sum of lengths, vocab] of whole prompts in one step, in the packed layout with a paged cache."""
    lengths = [len(r) for r in requests]
    total = sum(lengths)
    table_len = -(-max(lengths) // BLOCK)
    # Request i owns blocks 1 + i * table_len and following; block 0 is the null block.
    table = torch.arange(len(requests) * table_len, dtype=torch.int32).view(len(requests), table_len) + 1
    positions = torch.cat([torch.arange(n) for n in lengths])
    owner = torch.repeat_interleave(torch.arange(len(requests)), torch.tensor(lengths))
    slots = table[owner, positions // BLOCK].long() * BLOCK + positions % BLOCK
    values: dict[str, torch.Tensor] = {
        "input_ids": torch.tensor([t for r in requests for t in r])[None],
        "positions": positions[None],
        "logits_indices": torch.arange(total),
        "query_start_loc": torch.tensor([0, *lengths]).cumsum(0).int(),
        "seq_lens": torch.tensor(lengths).int(),
    }
    for group in range(len(ctx.cache_groups)):
        values |= {f"block_table.{group}": table, f"slot_mapping.{group}": slots}
    for layer, spec in enumerate(ctx.cache_layers):
        shape = (1 + table.numel(), spec.kv_heads, BLOCK)
        values[f"kv_k.{layer}"] = torch.zeros(*shape, spec.k_dim)
        values[f"kv_v.{layer}"] = torch.zeros(*shape, spec.v_dim)
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        values[name] = tensor.detach()
    return run(gm, ctx, values)[0]
