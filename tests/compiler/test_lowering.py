"""Lowering: sizes as expressions in T and R, views that cost nothing, and a JSON form that comes back whole."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import fx

from graphserve.compiler.lowering import Lowering
from graphserve.errors import CompileError
from graphserve.plan.runner import run_once
from graphserve.plan.schema import Launch, Plan
from tests.compiler.compiled import compiled_tiny
from tests.passes.graphs import TOKENS, graph_of

X = torch.zeros(1, TOKENS, 6)


def lowered(function: Any, inputs: dict[str, torch.Tensor] | None = None) -> tuple[Lowering, str]:
    gm = graph_of(function, inputs or {"x": X})
    gm.graph.eliminate_dead_code()
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    lowering = Lowering(placeholders[0].meta["val"].shape[1].node.expr, None)
    for node in placeholders:
        lowering.add_input(node, node.meta["gs_input"])
    return lowering, lowering.value_name(lowering.lower(gm.graph))


def kinds(launches: list[Launch]) -> list[tuple[str, str]]:
    return [(launch.op.split(".")[1], launch.kind) for launch in launches]


def test_sizes_are_affine_in_the_token_count() -> None:
    lowering, output = lowered(lambda x: torch.cat([x, x, x[:, :, :]], 1) * 2)
    assert lowering.buffers[output].shape == (1, "3*T", 6)
    lowering, output = lowered(lambda x: x.reshape(-1, 2) + 1)
    assert lowering.buffers[output].shape == ("3*T", 2)


def test_a_size_that_is_not_affine_is_an_error() -> None:
    with pytest.raises(CompileError, match="not affine in the number of tokens"):
        lowered(lambda x: (x @ x.transpose(1, 2)).reshape(-1) * 2)


def test_views_are_launches_without_work_and_own_no_buffer() -> None:
    lowering, output = lowered(lambda x: x.view(1, -1, 2, 3).transpose(1, 2)[..., 1:] * 2)
    assert kinds(lowering.launches) == [
        ("reshape", "view"),
        ("transpose", "view"),
        ("slice", "view"),
        ("mul", "reference"),
    ]
    assert list(lowering.buffers) == [output]


def test_a_reshape_that_must_copy_is_work() -> None:
    lowering, _ = lowered(lambda x: x.view(1, -1, 2, 3).transpose(1, 2).reshape(2, -1))
    assert kinds(lowering.launches)[-2:] == [("pointwise", "reference"), ("reshape", "view")]


def test_results_nobody_reads_get_no_buffer() -> None:
    lowering, _ = lowered(lambda x: x.topk(2, -1).indices)
    (topk,) = [launch for launch in lowering.launches if launch.op.startswith("aten.topk")]
    assert topk.outputs[0] is None and topk.outputs[1] is not None
    assert list(lowering.buffers) == [topk.outputs[1]]


def test_arguments_have_a_json_form() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        x.fake_mode.allow_non_fake_inputs = True  # type: ignore[attr-defined]
        filled = torch.full((1, x.shape[1], 1), float("-inf"), dtype=torch.float32, device=x.device)
        return x.to(torch.bfloat16).float() + filled

    lowering, _ = lowered(model)
    full = next(launch for launch in lowering.launches if launch.op.startswith("aten.full"))
    assert full.args == ([1, {"s": "T"}, 1], {"f": "-inf"})
    assert full.kwargs["dtype"] == {"dtype": "float32"} and full.kwargs["device"] == {"device": True}
    again = msgspec.json.decode(msgspec.json.encode(lowering.launches), type=list[Launch])
    assert msgspec.json.encode(again) == msgspec.json.encode(lowering.launches)


def test_an_argument_without_a_json_form_is_an_error() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.full.default, ([2], 1 + 2j)))
    next(iter(graph.nodes)).meta["val"] = torch.zeros(2, dtype=torch.complex64, device="meta")
    with pytest.raises(CompileError, match="has no JSON form"):
        Lowering(None, None).lower(graph)


def test_lowered_launches_compute_what_the_graph_computes() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        heads = x.view(1, -1, 2, 3).transpose(1, 2)
        return torch.cat([heads[..., :1].exp(), heads[..., 1:]], -1).transpose(1, 2).reshape(1, -1, 6).softmax(-1)

    lowering, output = lowered(model)
    x = torch.randn(1, 9, 6)
    tensors: dict[str, Any] = {"x": x}
    run_once(lowering.launches, tensors, num_tokens=9, device=torch.device("cpu"))
    assert torch.equal(tensors[output], model(x))


def test_a_whole_plan_comes_back_from_json() -> None:
    plan = compiled_tiny("gpt_oss").plan
    text = msgspec.json.encode(plan)
    again = msgspec.json.decode(text, type=Plan)
    assert msgspec.json.encode(again) == text
    assert again.weights == plan.weights and again.cache_layers == plan.cache_layers and again.buffers == plan.buffers


def test_launches_read_only_what_is_defined_before_them() -> None:
    from graphserve.plan.arena import launch_inputs

    plan = compiled_tiny("llama").plan
    inputs = ["input_ids", "positions", "logits_indices", "query_start_loc", "seq_lens", "block_table.0"]
    caches = [f"kv_{part}.{layer}" for part in "kv" for layer in range(4)]
    defined = {*plan.weights, *inputs, *caches, "slot_mapping.0"}
    for launch in plan.launches:
        assert set(launch_inputs(launch)) <= defined
        defined |= {name for name in launch.outputs if name is not None}
    assert set(plan.outputs) <= defined and set(plan.buffers) <= defined
