"""What a recorded step may not do, each done on purpose: the recorder names the launch and the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
import torch

from graphserve.errors import CompileError
from graphserve.kernels import register_all
from graphserve.kernels.triton.kernel import TritonArgument, TritonKernel
from graphserve.plan.runner import Action, PlanRunner, StepSize
from graphserve.plan.schema import Launch, Plan, TensorSpec
from graphserve.runtime.recorder import Recorder
from graphserve.runtime.step_graphs import GraphKey, Recording

register_all()
CPU = torch.device("cpu")
SIZE = StepSize((4, 4, 4))
KEY = GraphKey("greedy", 0, SIZE)
KEPT = torch.zeros(4)  # memory that belongs to nobody's plan


def small_plan() -> Plan:
    """b = (x + x) * 2, the second launch of a kind that a test binds."""
    launches = [
        Launch("aten.add.Tensor", ({"v": "x"}, {"v": "x"}), {}, ("a",)),
        Launch("aten.mul.Tensor", ({"v": "a"}, 2), {}, ("b",), "library", layer=3),
    ]
    buffers = {"a": TensorSpec(("T",), "float32"), "b": TensorSpec(("T",), "float32")}
    return Plan(
        model={}, launches=launches, init=[], buffers=buffers, weights={}, cache_layers=[], cache_groups=[],
        outputs=("b",), passes=[],
    )  # fmt: skip


class Binder:
    """Binds the second launch to what a test wants."""

    def __init__(self, make: Callable[[torch.Tensor, torch.Tensor], Action]) -> None:
        self._make = make

    def bind(self, launch: Launch, runner: PlanRunner, tensors: Mapping[str, Any], size: StepSize) -> Action:
        return self._make(tensors["a"], tensors["b"])

    def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
        return actions


class Step:
    """The plan on a runner, and a recorder for it."""

    def __init__(
        self, make: Callable[[torch.Tensor, torch.Tensor], Action] = lambda a, b: lambda: torch.mul(a, 2, out=b)
    ):
        self.inputs = {"x": torch.arange(4.0)}
        self.runner = PlanRunner(small_plan(), {}, self.inputs, lambda n, t, s: t, CPU, {"library": Binder(make)})
        self.recorder = Recorder(lambda size: {"T": size[0], "R": size[1], "S": size[2], "B_0": 2})

    def record(self) -> torch.Tensor:
        bound = self.runner.bind(SIZE)
        self.recorder.record(KEY, Recording(bound.launches, bound.tensors, lambda: dict(self.inputs)))
        return bound.outputs[0]


def test_a_clean_step_is_recorded_and_follows_its_inputs() -> None:
    step = Step()
    assert KEY not in step.recorder
    result = step.record()
    assert KEY in step.recorder and result.tolist() == [0, 4, 8, 12]
    step.inputs["x"].fill_(1)
    step.recorder.replay(KEY)
    assert result.tolist() == [4, 4, 4, 4]


def with_result(read: Callable[[torch.Tensor], object]) -> Callable[[torch.Tensor, torch.Tensor], Action]:
    """An action that does its work and something else."""

    def make(a: torch.Tensor, b: torch.Tensor) -> Action:
        def action() -> None:
            torch.mul(a, 2, out=b)
            read(b)

        return action

    return make


def out_of_place(a: torch.Tensor, b: torch.Tensor) -> Action:
    return lambda: b.copy_(a * 2)


def elsewhere(a: torch.Tensor, b: torch.Tensor) -> Action:
    return lambda: torch.mul(a, 2, out=KEPT)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_result(lambda b: b[0].item()), "Tensor.item reads a tensor's values on the host"),
        (with_result(lambda b: b.tolist()), "Tensor.tolist reads a tensor's values on the host"),
        (with_result(lambda b: b.cpu()), "Tensor.cpu reads a tensor's values on the host"),
        (with_result(lambda b: b.numpy()), "Tensor.numpy reads a tensor's values on the host"),
        (with_result(lambda b: "positive" if b[1] > 0 else "not"), "allocates memory"),
        (with_result(lambda b: bool(b.bool()[1])), "allocates memory"),
        (with_result(lambda b: bool(b[1])), "Tensor.__bool__ reads a tensor's values on the host"),
        (with_result(torch.nonzero), "aten.nonzero.default reads a tensor's values on the host"),
        (with_result(lambda b: b.masked_select(b == b)), "allocates memory"),
        (out_of_place, "aten.mul.Tensor allocates memory"),
        (with_result(lambda b: torch.empty(3)), "aten.empty.memory_format allocates memory"),
        (with_result(lambda b: b.uniform_()), "aten.uniform_.default draws random numbers"),
        (elsewhere, "aten.mul.out writes to what is neither a buffer of the plan nor state"),
        (with_result(lambda b: KEPT.add_(1)), "aten.add_.Tensor writes to what is neither a buffer"),
        (with_result(lambda b: torch.cuda.synchronize()), "it waits for the device"),
        (with_result(lambda b: torch.cuda.Event.synchronize(None)), "it waits for the device"),  # type: ignore[arg-type]
    ],
)
def test_what_a_graph_cannot_repeat_is_refused(make: Any, reason: str) -> None:
    step = Step(make)
    with pytest.raises(CompileError, match=r"launch 1 \(aten.mul.Tensor, layer 3\) cannot be part") as caught:
        step.record()
    assert reason in str(caught.value)
    assert KEY not in step.recorder


def test_the_checks_end_with_the_launch() -> None:
    step = Step(out_of_place)
    with pytest.raises(CompileError):
        step.record()
    assert torch.ones(2).sum().item() == 2 and torch.cuda.synchronize.__module__ == "torch.cuda"


def test_an_input_that_moved_is_refused_at_replay() -> None:
    step = Step()
    step.record()
    step.inputs["x"] = step.inputs["x"].clone()
    with pytest.raises(CompileError, match=r"launch 0 \(aten.add.Tensor\) .* its input x has moved"):
        step.recorder.replay(KEY)


def test_a_length_that_the_host_knows_is_refused_at_replay() -> None:
    num_tokens = 4

    def make(a: torch.Tensor, b: torch.Tensor) -> Action:
        return lambda: torch.mul(a[:num_tokens], 2, out=b[:num_tokens])

    step = Step(make)
    step.record()
    step.recorder.replay(KEY)
    num_tokens = 3
    with pytest.raises(CompileError, match="launch 1 .* a length that the host knows"):
        step.recorder.replay(KEY)


def test_a_number_that_the_host_knows_is_refused_at_replay() -> None:
    factors = [2.0]
    step = Step(lambda a, b: lambda: torch.mul(a, factors[0], out=b))
    step.record()
    factors[0] = 3.0
    with pytest.raises(CompileError, match="launch 1 .* a length that the host knows"):
        step.recorder.replay(KEY)


KERNEL = TritonKernel("gs_scale", "0" * 64, "", (TritonArgument("T", "i32", "T"),), {}, ("cdiv(T, 32)", "S*B_0", 1), 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"grid": ("cdiv(max_seq_len, 32)", 1, 1)}, "'cdiv(max_seq_len, 32)' is not an expression in T, R, S, B_g"),
        ({"grid": ("T", "seq_lens[0]", 1)}, "its grid is not made of constants of a bucket"),
        ({"grid": ("T", "B_7", 1)}, "needs the step scalar B_7"),
        ({"scratch": "4*num_tokens"}, "'4*num_tokens' is not an expression"),
        ({"arguments": (TritonArgument("n", "i32", "context_len"),)}, "its kernel takes context_len"),
    ],
)
def test_a_grid_of_anything_but_the_buckets_sizes_is_refused(change: dict[str, Any], reason: str) -> None:
    step = Step()
    kernels = {"aten.mul.Tensor": [KERNEL]}
    step.recorder = Recorder(lambda size: {"T": 4, "R": 4, "S": 4, "B_0": 2}, lambda launch: kernels.get(launch.op, []))
    step.record()
    kernels["aten.mul.Tensor"] = [msgspec.structs.replace(KERNEL, **change)]
    with pytest.raises(CompileError, match="launch 1") as caught:
        step.record()
    assert reason in str(caught.value)


def test_an_op_may_read_and_allocate_within_itself_only() -> None:
    """The reference of process_logits looks at its lists on the host, in the place of a kernel that does not."""
    logits, starts = torch.zeros(1, 300), torch.tensor([0, 1], dtype=torch.int32)
    tensors = {"logits": logits, "starts": starts, "ids": torch.tensor([7], dtype=torch.int32)}
    names = [{"v": "logits"}, None, None, None, None, {"v": "starts"}, {"v": "ids"}, *[None] * 11]
    plan = msgspec.structs.replace(
        small_plan(),
        launches=[Launch("gs.process_logits.default", tuple(names), {}, ("scores", "group_max"))],
        buffers={"scores": TensorSpec((1, 300), "float32"), "group_max": TensorSpec((1, 3), "float32")},
        outputs=("scores",),
    )
    bound = PlanRunner(plan, {}, tensors, lambda n, t, s: t, CPU).bind(SIZE)
    Recorder(lambda size: {}).record(KEY, Recording(bound.launches, bound.tensors, lambda: tensors))
    assert bound.outputs[0][0, 7] == -torch.inf


def test_state_that_an_op_declares_to_change_may_be_written() -> None:
    kv = torch.zeros(2, 1, 4, 3)
    rows = torch.ones(4, 1, 3)
    tensors = {"rows": rows, "kv": kv, "slots": torch.tensor([4, 5, 6, 7])}
    args = tuple({"v": name} for name in ("rows", "rows", "kv", "kv", "slots"))
    plan = msgspec.structs.replace(
        small_plan(), launches=[Launch("gs.kv_write.default", args, {}, ())], buffers={}, outputs=()
    )
    bound = PlanRunner(plan, {}, tensors, lambda n, t, s: t, CPU).bind(SIZE)
    Recorder(lambda size: {}).record(KEY, Recording(bound.launches, bound.tensors, lambda: tensors))
    assert kv[1].sum() == 12 and kv[0].sum() == 0
