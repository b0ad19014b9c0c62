"""Layers are grouped by what their code can see, and repeated only when that is safe."""

from __future__ import annotations

import pytest
import torch

from graphserve.compiler.canonicalize import canonicalize
from graphserve.compiler.capture import capture, register_interfaces
from graphserve.compiler.layers import LayerStack, find_layers, marked, regions, repeat_layers, why_not_repeatable
from graphserve.models.meta_model import build_meta_model
from tests.compiler.compiled import compiled_tiny
from tests.tiny_models import tiny_config


def meta_model(name: str, num_layers: int | None = None) -> torch.nn.Module:
    register_interfaces()
    config = tiny_config(name)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
    return build_meta_model(config, torch.float32)


def traced(model: torch.nn.Module, stack: LayerStack) -> torch.fx.GraphModule:
    names = {id(t): n for n, t in (*model.named_buffers(), *model.named_parameters())}
    with marked(model, stack):
        gm = capture(model, names)
    canonicalize(gm)
    return gm


def test_equal_layers_are_one_type_and_its_first_and_last_are_traced() -> None:
    stack = find_layers(meta_model("llama", 7))
    assert stack == LayerStack("model.layers", (0,) * 7, (0, 6))
    assert stack.is_reduced and [stack.representative(i) for i in range(7)] == [0, 0, 0, 0, 0, 0, 6]


def test_full_depth_traces_every_layer() -> None:
    stack = find_layers(meta_model("llama", 7), full_depth=True)
    assert stack is not None and stack.traced == tuple(range(7)) and not stack.is_reduced


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("gemma3_text", (0, 1, 0, 1)),  # sliding and full attention
        ("qwen3_moe", (0, 1, 0, 0)),  # a dense layer among experts
        ("deepseek_v3", (0, 1, 1, 1)),
    ],
)
def test_layers_that_differ_have_types_of_their_own(name: str, types: tuple[int, ...]) -> None:
    stack = find_layers(meta_model(name))
    assert stack is not None and stack.types == types


def test_an_attribute_that_differs_makes_another_type() -> None:
    model = meta_model("llama", 4)
    model.model.layers[2].self_attn.scaling *= 2
    stack = find_layers(model)
    assert stack is not None and stack.types == (0, 0, 1, 0)


def test_the_image_towers_layers_are_not_the_decoders() -> None:
    stack = find_layers(meta_model("got_ocr2"))
    assert stack is not None and "vision" not in stack.path


def test_marking_is_undone() -> None:
    model = meta_model("llama", 6)
    layers, stack = model.model.layers, find_layers(model)
    assert stack is not None
    with marked(model, stack):
        assert (len(model.model.layers), model.config.num_hidden_layers) == (2, 2)
    assert model.model.layers is layers and model.config.num_hidden_layers == 6
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_repetition_gives_each_layer_its_own_weights_and_number() -> None:
    model = meta_model("llama", 5)
    stack = find_layers(model)
    assert stack is not None
    gm = traced(model, stack)
    assert set(regions(gm.graph)) == {0, 4} and why_not_repeatable(gm, stack) is None
    full = repeat_layers(gm, stack)
    attention = [n for n in full.graph.nodes if n.target is torch.ops.gs.attention_trace.default]
    assert [n.args[4] for n in attention] == [n.meta["gs_layer"] for n in attention] == [0, 1, 2, 3, 4]
    weights = {n.meta["gs_weight"] for n in full.graph.nodes if "gs_weight" in n.meta}
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters <= weights
    assert not any("layer_begin" in str(n.target) or "layer_end" in str(n.target) for n in full.graph.nodes)


def test_a_value_handed_on_beside_the_hidden_state_is_noticed() -> None:
    model = meta_model("llama", 4)
    stack = find_layers(model)
    assert stack is not None
    gm = traced(model, stack)
    found = regions(gm.graph)
    inner, later = found[0].nodes[0], next(n for n in found[3].nodes if n.target is torch.ops.aten.add.Tensor)
    later.args = (later.args[0], inner)
    reason = why_not_repeatable(gm, stack)
    assert reason is not None and f"layer 0 hands {inner.name} to {later.name} beside the hidden state" in reason


def test_traced_layers_of_a_type_that_differ_are_noticed() -> None:
    model = meta_model("llama", 4)
    stack = find_layers(model)
    assert stack is not None
    gm = traced(model, stack)
    scaled = next(n for n in regions(gm.graph)[3].nodes if n.target is torch.ops.gs.attention_trace.default)
    scaled.args = (*scaled.args[:5], 0.5, *scaled.args[6:])
    assert why_not_repeatable(gm, stack) == "layers 0 and 3 look alike but trace differently"


def test_work_between_layers_is_noticed() -> None:
    model = meta_model("llama", 4)
    stack = find_layers(model)
    assert stack is not None
    gm = traced(model, stack)
    begin = regions(gm.graph)[3].begin
    with gm.graph.inserting_before(begin):
        doubled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (begin.args[0], 2))
    begin.args = (doubled, 3)
    assert why_not_repeatable(gm, stack) == "the model computes something of its own between layers"


def test_a_model_whose_layers_share_keys_is_traced_whole_says_so_and_still_numbers_them() -> None:
    built = compiled_tiny("gemma4_text:shared")
    assert built.stack is None
    (note,) = built.notes
    assert note.startswith("layers are not separable: layer 2 hands ")
    attention = [x.layer for x in built.plan.launches if x.op == "gs.paged_attention.default"]
    assert attention == list(range(built.plan.model["num_layers"]))
    assert [spec.shared_with for spec in built.plan.cache_layers] == [None, None, None, None, 2, 3]
