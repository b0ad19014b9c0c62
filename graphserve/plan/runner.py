"""Run a plan: bind its launches to tensors once per step size, then execute them in order.

The runner knows no model and no kernel. ``reference`` and ``library`` launches call a torch operator and copy its
result into the plan's buffer; other kinds are bound by a *binder* given by the caller (generated C++, Triton). Running
a plan needs neither Dynamo nor Inductor nor modelling code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from graphserve.plan.arena import layout
from graphserve.plan.schema import Launch, Plan, TensorSpec
from graphserve.plan.symbols import evaluate

_MAX_BINDINGS = 32  # step sizes whose views are kept; a binding is a few hundred Python objects

Action = Callable[[], object]


class Binder(Protocol):
    """Binds launches of other kinds than ``reference``. Called in plan order."""

    def bind(
        self, launch: Launch, runner: PlanRunner, tensors: Mapping[str, torch.Tensor], size: StepSize
    ) -> Action | None:
        """The action for ``launch``, or None if this binder leaves it to its reference."""

    def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
        """Called with all bound actions of a step size; may merge neighbours."""


class StepSize(tuple[int, int, int]):
    """(num_tokens T, num_rows R, num_seqs S) of a step, padding included."""

    __slots__ = ()

    @property
    def num_tokens(self) -> int:
        return self[0]

    @property
    def num_rows(self) -> int:
        return self[1]

    @property
    def num_seqs(self) -> int:
        return self[2]


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resolve_op(op: str) -> Callable[..., Any]:
    """``"aten.mul.Tensor"`` or ``"gs.linear.default"`` → the torch operator."""
    namespace, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def decode_argument(
    value: Any, tensors: Mapping[str, Any], num_tokens: int, num_rows: int, device: torch.device
) -> Any:
    """A launch argument from its JSON form (see :class:`graphserve.plan.schema.Launch`)."""
    if isinstance(value, dict):
        kind, content = next(iter(value.items()))
        if kind == "v":
            return tensors[content]
        if kind == "s":
            return evaluate(content, num_tokens, num_rows)
        if kind == "device":
            return device
        if kind == "f":
            return float(content)
        return getattr(torch, content)  # dtype, layout, memory_format
    if isinstance(value, (list, tuple)):
        return [decode_argument(v, tensors, num_tokens, num_rows, device) for v in value]
    return value


def run_once(launches: list[Launch], tensors: dict[str, Any], num_tokens: int, device: torch.device) -> None:
    """Execute launches functionally, adding their results to ``tensors`` (used for ``Plan.init``)."""
    for launch in launches:
        args = [decode_argument(a, tensors, num_tokens, 0, device) for a in launch.args]
        kwargs = {k: decode_argument(a, tensors, num_tokens, 0, device) for k, a in launch.kwargs.items()}
        results = resolve_op(launch.op)(*args, **kwargs)
        if isinstance(results, torch.Tensor):
            results = (results,)
        tensors.update((n, r) for n, r in zip(launch.outputs, results, strict=True) if n is not None)


class Arena:
    """Memory of plans' buffers. Plans that never run at the same time share one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)

    def reserve(self, num_bytes: int) -> None:
        """Make room for so many bytes; what grows moves and loses its contents."""
        if num_bytes > self.memory.numel():
            self.release()  # free the old one first
            self.memory = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def release(self) -> None:
        """Give the memory back."""
        self.memory = torch.empty(0, dtype=torch.uint8, device=self._device)


@dataclass(frozen=True)
class BoundPlan:
    """A plan's launches for one step size.

    Attributes:
        launches: every launch that does work and its action, in order; actions are not merged.
        tensors: all values by name.
        outputs: the plan's outputs.
    """

    launches: list[tuple[Launch, Action]]
    tensors: dict[str, Any]
    outputs: tuple[torch.Tensor, ...]


class PlanRunner:
    """Executes a plan on one device.

    Args:
        plan: the plan; its weights and init values must all be in ``weights``.
        weights: value name → tensor on ``device``.
        inputs: value name → tensor whose first ``T`` (or ``R``, ``S``) entries are the step's. See ``view_input``.
        view_input: cuts a step's part out of an input tensor: (name, tensor, size) → tensor.
        binders: by launch kind.
        arena: where buffers live, one of its own by default.

    Invariant: buffers stay where they are until ``reserve`` is called with a larger size, here or on another runner
    of the same arena.
    """

    def __init__(
        self,
        plan: Plan,
        weights: dict[str, torch.Tensor],
        inputs: dict[str, torch.Tensor],
        view_input: Callable[[str, torch.Tensor, StepSize], torch.Tensor],
        device: torch.device,
        binders: dict[str, Binder] | None = None,
        arena: Arena | None = None,
    ) -> None:
        self.plan = plan
        self.weights = weights
        self.inputs = inputs
        self.device = device
        self._view_input = view_input
        self._binders = binders or {}
        self._arena = arena or Arena(device)
        self._bound_memory = self._arena.memory  # what the bindings point into
        self._offsets: dict[str, int] = {}
        self._capacity = (0, 0)
        self._bindings: OrderedDict[StepSize, tuple[list[Action], tuple[torch.Tensor, ...]]] = OrderedDict()

    @property
    def arena_bytes(self) -> int:
        return self._arena.memory.numel()

    def reserve(self, max_tokens: int, max_rows: int) -> None:
        """Make room for steps of this size. Moves every buffer if it must grow; bindings are then made anew."""
        if max_tokens <= self._capacity[0] and max_rows <= self._capacity[1]:
            return
        self._capacity = (max(max_tokens, self._capacity[0]), max(max_rows, self._capacity[1]))
        self._bindings.clear()
        placed = layout(self.plan, *self._capacity)
        self._bound_memory = torch.empty(0)  # no second reference while the arena grows
        self._arena.reserve(placed.num_bytes)
        self._offsets = placed.offsets

    def release(self) -> None:
        """Give back the arena and all references to weights and inputs."""
        self._bindings.clear()
        self._bound_memory = torch.empty(0)
        self._arena.release()
        self._capacity = (0, 0)
        self.weights.clear()
        self.inputs.clear()

    def set_plan(self, plan: Plan, binders: dict[str, Binder]) -> None:
        """Run ``plan`` from now on: the same launches, some of another kind."""
        assert plan.buffers == self.plan.buffers
        self.plan, self._binders = plan, binders
        self._bindings.clear()

    def invalidate(self) -> None:
        """Forget bindings; call after a tensor in ``inputs`` or ``weights`` was replaced."""
        self._bindings.clear()

    def run(self, size: StepSize) -> tuple[torch.Tensor, ...]:
        """Execute one step whose inputs are already in place. The next step overwrites the outputs it returns."""
        if self._bound_memory is not self._arena.memory:
            self._bindings.clear()
        bound = self._bindings.get(size)
        if bound is None:
            fresh = self.bind(size)
            actions = [action for _, action in fresh.launches]
            for binder in self._binders.values():
                actions = binder.finish(actions, size)
            bound = actions, fresh.outputs
            self._bindings[size] = bound
            if len(self._bindings) > _MAX_BINDINGS:
                self._bindings.popitem(last=False)
        else:
            self._bindings.move_to_end(size)
        actions, outputs = bound
        for action in actions:
            action()
        return outputs

    def _buffer(self, name: str, size: StepSize) -> torch.Tensor:
        spec: TensorSpec = self.plan.buffers[name]
        shape = [evaluate(d, size.num_tokens, size.num_rows) for d in spec.shape]
        dtype = torch_dtype(spec.dtype)
        count = dtype.itemsize
        for dim in shape:
            count *= dim
        offset = self._offsets[name]
        return self._arena.memory[offset : offset + count].view(dtype).view(shape)

    def bind(self, size: StepSize) -> BoundPlan:
        """The launches of a step size, each with its action."""
        self.reserve(size.num_tokens, size.num_rows)
        self._bound_memory = self._arena.memory
        tensors: dict[str, Any] = dict(self.weights)
        for name, tensor in self.inputs.items():
            tensors[name] = self._view_input(name, tensor, size)
        launches: list[tuple[Launch, Action]] = []
        for launch in self.plan.launches:
            if launch.kind == "view":
                run_view(launch, tensors, size, self.device)
                continue
            for output in launch.outputs:
                if output is not None:
                    tensors[output] = self._buffer(output, size)
            binder = self._binders.get(launch.kind)
            action = binder.bind(launch, self, tensors, size) if binder is not None else None
            launches.append((launch, action or self._bind_reference(launch, tensors, size)))
        return BoundPlan(launches, tensors, tuple(tensors[name] for name in self.plan.outputs))

    def _bind_reference(self, launch: Launch, tensors: Mapping[str, Any], size: StepSize) -> Action:
        function = resolve_op(launch.op)
        args = [decode_argument(a, tensors, size.num_tokens, size.num_rows, self.device) for a in launch.args]
        kwargs = {
            k: decode_argument(a, tensors, size.num_tokens, size.num_rows, self.device)
            for k, a in launch.kwargs.items()
        }
        outputs = [None if n is None else tensors[n] for n in launch.outputs]

        def call() -> None:
            results = function(*args, **kwargs)
            if isinstance(results, torch.Tensor):
                results = (results,)
            for output, result in zip(outputs, results or (), strict=True):
                if output is not None:
                    output.copy_(result)

        return call


def run_view(launch: Launch, tensors: dict[str, Any], size: StepSize, device: torch.device) -> None:
    """Evaluate a view launch: adds tensors that alias its input."""
    args = [decode_argument(a, tensors, size.num_tokens, size.num_rows, device) for a in launch.args]
    kwargs = {k: decode_argument(a, tensors, size.num_tokens, size.num_rows, device) for k, a in launch.kwargs.items()}
    results = resolve_op(launch.op)(*args, **kwargs)
    if isinstance(results, torch.Tensor):
        results = (results,)
    tensors.update((n, r) for n, r in zip(launch.outputs, results, strict=True) if n is not None)
