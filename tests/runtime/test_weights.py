"""Parameters → plan weights: joined, transposed, computed at load; what is wrong is named."""

import pytest
import torch

from graphserve.errors import CheckpointError
from graphserve.kernels import register_all
from graphserve.plan.schema import Launch, Plan, TensorSpec, WeightPart, WeightSpec
from graphserve.runtime.weights import materialize_weights

CPU = torch.device("cpu")


def plan_with(weights: dict[str, WeightSpec], init: list[Launch] | None = None) -> Plan:
    return Plan({"max_model_len": 4}, [], init or [], {}, weights, [], [], (), [])


def from_parameters(shape: tuple[int, ...], *parts: WeightPart, dim: int = 0, dtype: str = "float32") -> WeightSpec:
    return WeightSpec(TensorSpec(shape, dtype), "parameters", parts, dim)


def test_siblings_are_joined_in_their_order_whatever_the_order_of_the_stream() -> None:
    plan = plan_with({"qkv": from_parameters((5, 3), WeightPart("q", 2), WeightPart("k", 2), WeightPart("v", 1))})
    q, k, v = torch.ones(2, 3), 2 * torch.ones(2, 3), 3 * torch.ones(1, 3)
    made = materialize_weights(plan, [("v", v), ("q", q), ("k", k)], {}, CPU)
    assert torch.equal(made["qkv"], torch.cat([q, k, v]))


def test_a_transposed_part_is_transposed_and_cast() -> None:
    plan = plan_with({"w": from_parameters((2, 3), WeightPart("p", 2, is_transposed=True), dtype="bfloat16")})
    p = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(materialize_weights(plan, [("p", p)], {}, CPU)["w"], p.t().to(torch.bfloat16))


def test_a_parameter_may_serve_two_weights() -> None:
    both = {"a": from_parameters((2, 2), WeightPart("p", 2)), "b": from_parameters((2, 2), WeightPart("p", 2))}
    made = materialize_weights(plan_with(both), [("p", torch.eye(2))], {}, CPU)
    assert torch.equal(made["a"], made["b"])


def test_parameters_that_never_come_are_named() -> None:
    plan = plan_with({"w": from_parameters((2, 2), WeightPart("model.p", 2))})
    with pytest.raises(CheckpointError, match=r"never came: model\.p \(1 in all\)"):
        materialize_weights(plan, [("other", torch.eye(2))], {}, CPU)


def test_a_wrong_shape_names_parameter_found_and_needed() -> None:
    plan = plan_with({"w": from_parameters((2, 2), WeightPart("p", 2))})
    with pytest.raises(CheckpointError, match=r"p has shape \[3, 2\].*\[2, 2\] is needed"):
        materialize_weights(plan, [("p", torch.zeros(3, 2))], {}, CPU)


def test_init_launches_see_every_position() -> None:
    register_all()
    launches = [
        Launch("aten.mul.Tensor", ({"v": "positions"}, {"v": "scale"}), {}, ("table.0/mul",)),
        Launch("aten.reshape.default", ({"v": "table.0/mul"}, [4, 1]), {}, ("table.0",), kind="view"),
    ]
    weights = {
        "scale": WeightSpec(TensorSpec((1,), "float32"), "constant"),
        "table.0": WeightSpec(TensorSpec((4, 1), "float32"), "init"),
    }
    made = materialize_weights(plan_with(weights, launches), [], {"scale": torch.tensor([0.5])}, CPU)
    assert made["table.0"].flatten().tolist() == [0.0, 0.5, 1.0, 1.5]
