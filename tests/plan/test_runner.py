"""The runner computes a plan's launches for each step size, in buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphserve.plan.runner import Action, PlanRunner, StepSize, decode_argument
from graphserve.plan.schema import Launch, Plan, TensorSpec

CPU = torch.device("cpu")


def softmax_plan() -> Plan:
    """logits = ((x * weight).view(T, 2, 3).transpose(0, 1) + 1).softmax(-1)[rows], two launches through views."""
    launches = [
        Launch("aten.mul.Tensor", ({"v": "x"}, {"v": "weight"}), {}, ("scaled",)),
        Launch("aten.reshape.default", ({"v": "scaled"}, [{"s": "T"}, 2, 3]), {}, ("heads",), "view"),
        Launch("aten.transpose.int", ({"v": "heads"}, 0, 1), {}, ("turned",), "view"),
        Launch("aten.add.Tensor", ({"v": "turned"}, 1), {}, ("moved",)),
        Launch("aten.topk.default", ({"v": "moved"}, 1), {}, ("top", None)),
        Launch("aten.index_select.default", ({"v": "top"}, 1, {"v": "rows"}), {}, ("logits",)),
    ]
    buffers = {
        "scaled": TensorSpec(("T", 6), "float32"),
        "moved": TensorSpec((2, "T", 3), "float32"),
        "top": TensorSpec((2, "T", 1), "float32"),
        "logits": TensorSpec((2, "R", 1), "float32"),
    }
    return Plan(
        model={}, launches=launches, init=[], buffers=buffers, weights={}, cache_layers=[], cache_groups=[],
        outputs=("logits",), passes=[],
    )  # fmt: skip


def expected(x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    top = ((x * weight).view(-1, 2, 3).transpose(0, 1) + 1).topk(1).values
    return top[:, rows]


def view_input(name: str, tensor: torch.Tensor, size: StepSize) -> torch.Tensor:
    return tensor[: size.num_tokens if name == "x" else size.num_rows]


def make_runner(binders: dict[str, object] | None = None) -> PlanRunner:
    weights = {"weight": torch.arange(6.0) - 3}
    inputs = {"x": torch.randn(16, 6), "rows": torch.zeros(4, dtype=torch.int64)}
    return PlanRunner(softmax_plan(), weights, inputs, view_input, CPU, binders)  # type: ignore[arg-type]


def test_every_step_size_gives_the_right_rows() -> None:
    runner = make_runner()
    runner.reserve(16, 4)
    for tokens, rows in ((1, 1), (16, 4), (7, 2), (16, 1), (1, 1)):
        runner.inputs["rows"][:rows] = torch.randint(0, tokens, (rows,))
        runner.inputs["x"][:tokens] = torch.randn(tokens, 6)
        (result,) = runner.run(StepSize((tokens, rows, 1)))
        truth = expected(runner.inputs["x"][:tokens], runner.weights["weight"], runner.inputs["rows"][:rows])
        assert torch.equal(result, truth)


def test_a_larger_step_than_reserved_makes_the_arena_grow() -> None:
    runner = make_runner()
    runner.reserve(2, 1)
    small = runner.arena_bytes
    (result,) = runner.run(StepSize((16, 4, 1)))
    truth = expected(runner.inputs["x"], runner.weights["weight"], runner.inputs["rows"])
    assert torch.equal(result, truth) and runner.arena_bytes > small


def test_buffers_stay_where_they_are_from_step_to_step() -> None:
    runner = make_runner()
    runner.reserve(16, 4)
    places = {runner.run(StepSize((tokens, 1, 1)))[0].data_ptr() for tokens in (1, 5, 16)}
    assert len(places) == 1


def test_a_binder_takes_the_launches_it_wants_and_sees_them_all_at_the_end() -> None:
    class Doubling:
        """Computes additions as twice their sum; leaves the rest to the reference."""

        def __init__(self) -> None:
            self.finished: list[tuple[int, StepSize]] = []

        def bind(
            self, launch: Launch, runner: PlanRunner, tensors: Mapping[str, torch.Tensor], size: StepSize
        ) -> Action | None:
            if launch.op != "aten.add.Tensor":
                return None
            x, out = tensors["turned"], tensors["moved"]
            return lambda: out.copy_(2 * (x + 1))

        def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
            self.finished.append((len(actions), size))
            return actions

    binder = Doubling()
    runner = make_runner({"reference": binder})
    (result,) = runner.run(StepSize((4, 2, 1)))
    truth = expected(runner.inputs["x"][:4], runner.weights["weight"], runner.inputs["rows"][:2])
    assert torch.equal(result, 2 * truth)
    assert binder.finished == [(4, (4, 2, 1))]  # views take no action


def test_arguments_come_back_from_their_json_form() -> None:
    tensors = {"x": torch.zeros(2)}
    value = [
        {"v": "x"},
        {"s": "2*T+R"},
        {"dtype": "bfloat16"},
        {"device": True},
        {"f": "-inf"},
        {"layout": "strided"},
        3,
    ]
    x, size, dtype, device, number, memory, plain = decode_argument(value, tensors, 5, 1, CPU)
    assert x is tensors["x"] and size == 11 and dtype is torch.bfloat16 and device == CPU
    assert number == float("-inf") and memory is torch.strided and plain == 3
