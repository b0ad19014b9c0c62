"""Stands in for CUDA graphs on machines without a GPU: keeps launches, does them again, and checks what a graph needs.

A graph repeats kernels with the addresses, grids and scalars that they were captured with. So a launch may not look at
a tensor on the host, allocate, draw random numbers or wait, must write into the plan's buffers or into state that its
op declares to change, and must be the same at every replay. A ``reference`` launch stands for one kernel: what its own
op does inside is the kernel's business, and its temporaries stand for registers.

Two modes of torch watch everything else that an action does. The trace of its operators, with addresses, shapes and
numbers, must be at each replay what it was when it was recorded; a length that the host knew shows there. (A reference
is one operator whose arguments were fixed when it was bound: at a replay there is nothing to see.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphserve.errors import CompileError
from graphserve.kernels.triton.grid import evaluate, grid_size
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.plan.arena import launch_inputs, value_names
from graphserve.plan.runner import Action, StepSize
from graphserve.plan.schema import Launch
from graphserve.runtime.step_graphs import GraphKey, Recording

_HOST_READS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
}
_WAITS: tuple[tuple[Any, str], ...] = (
    (torch.cuda, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
    (torch.cuda.Event, "synchronize"),
)

Trace = list[tuple[Any, ...]]


class Recorder:
    """Recorded steps of plans whose launches are ``reference``, ``library`` or interpreted Triton ones.

    Args:
        scalars: the step scalars of a size: T, R, S and B_g.
        kernels: the generated kernels of a launch's GPU form, whose grids are checked; none by default.
    """

    def __init__(
        self,
        scalars: Callable[[StepSize], Mapping[str, int]],
        kernels: Callable[[Launch], Sequence[TritonKernel]] = lambda launch: (),
    ) -> None:
        self._scalars = scalars
        self._kernels = kernels
        self._recorded: dict[GraphKey, _Recorded] = {}
        self.num_bytes = 0

    def __contains__(self, key: GraphKey) -> bool:
        return key in self._recorded

    def __len__(self) -> int:
        return len(self._recorded)

    def record(self, key: GraphKey, recording: Recording) -> bool:
        """Do the launches once under checks and keep them.

        Raises:
            CompileError: a launch does what a graph cannot; names the launch and the reason.
        """
        memory = _Memory(recording)
        traces: list[Trace] = []
        for index, (launch, action) in enumerate(recording.launches):
            self._check_kernels(index, launch, key.size)
            traces.append(_run(index, launch, action, memory))
        self._recorded[key] = _Recorded(recording, memory, _addresses(recording.current()), traces)
        return True

    def replay(self, key: GraphKey) -> None:
        """Do the launches again under the same checks.

        Raises:
            CompileError: an input has moved, or a launch does something else than when it was recorded.
        """
        recording, memory, addresses, traces = self._recorded[key]
        now = _addresses(recording.current())
        for name, address in addresses.items():
            if now.get(name) != address:
                launches = [launch for launch, _ in recording.launches]
                first = next((i for i, launch in enumerate(launches) if name in launch_inputs(launch)), 0)
                _refuse(first, launches[first], f"its input {name} has moved since it was recorded")
        for index, ((launch, action), expected) in enumerate(zip(recording.launches, traces, strict=True)):
            if launch.kind == "reference":  # bound by the plan's runner: one operator with arguments that are fixed
                action()
                continue
            trace = _run(index, launch, action, memory)
            if trace != expected:
                old, new = next(((a, b) for a, b in zip(expected, trace, strict=False) if a != b), (expected, trace))
                _refuse(index, launch, f"it was recorded as {old} and now does {new}: a length that the host knows?")

    def close(self) -> None:
        self._recorded.clear()

    def _check_kernels(self, index: int, launch: Launch, size: StepSize) -> None:
        scalars = self._scalars(size)
        for kernel in self._kernels(launch):
            unknown = [name for name in kernel.scalars if name not in scalars]
            if unknown:
                _refuse(index, launch, f"its kernel takes {', '.join(unknown)}, which are no constants of a bucket")
            try:
                grid_size(kernel.grid, scalars)
                evaluate(kernel.scratch, scalars)
            except ValueError as error:
                _refuse(index, launch, f"its grid is not made of constants of a bucket: {error}")


def _refuse(index: int, launch: Launch, reason: str) -> None:
    place = f", layer {launch.layer}" if launch.layer is not None else ""
    raise CompileError(f"launch {index} ({launch.op}{place}) cannot be part of a recorded step: {reason}")


def _addresses(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


class _Memory:
    """Storages that a recording knows, and those that its launches may write: the plan's buffers and declared state."""

    def __init__(self, recording: Recording) -> None:
        tensors = recording.tensors
        self.known = {_storage(tensor) for tensor in tensors.values()}
        self.written: set[int] = set()
        for launch, _ in recording.launches:
            self.written.update(_storage(tensors[name]) for name in launch.outputs if name is not None)
            for argument, value in zip(_schema(launch.op).arguments, launch.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.written.update(_storage(tensors[name]) for name in value_names(value))


class _Recorded(NamedTuple):
    recording: Recording
    memory: _Memory
    addresses: dict[str, int]
    traces: list[Trace]


def _schema(op: str) -> Any:
    namespace, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _run(index: int, launch: Launch, action: Action, memory: _Memory) -> Trace:
    if launch.kind == "triton":  # a kernel: nothing of it passes through torch
        action()
        return []
    watch = _Watch(index, launch, memory)
    with _no_waiting(index, launch), _Functions(watch), watch:
        action()
    return watch.trace


@contextmanager
def _no_waiting(index: int, launch: Launch) -> Iterator[None]:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        _refuse(index, launch, "it waits for the device")

    before = [getattr(owner, name) for owner, name in _WAITS]
    for owner, name in _WAITS:
        setattr(owner, name, refuse)
    try:
        yield
    finally:
        for (owner, name), function in zip(_WAITS, before, strict=True):
            setattr(owner, name, function)


class _Watch(TorchDispatchMode):
    """Sees every operator of an action."""

    def __init__(self, index: int, launch: Launch, memory: _Memory) -> None:
        super().__init__()
        self.index, self.launch = index, launch
        self.trace: Trace = []
        self._memory = memory

    def refuse(self, reason: str) -> None:
        _refuse(self.index, self.launch, reason)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_own = self.launch.kind == "reference" and str(func) == self.launch.op and not self.trace
        self.trace.append((str(func), *(self._described(a) for a in (*args, *kwargs.values()))))
        if not is_own:
            self._check(func)
        self._check_writes(func, args, kwargs)
        with torch._C.DisableTorchFunction():  # what the op does inside is its own business
            return func(*args, **kwargs)

    def _check(self, func: Any) -> None:
        tags = func.tags
        if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
            self.refuse(f"{func} reads a tensor's values on the host")
        if torch.Tag.nondeterministic_seeded in tags:
            self.refuse(f"{func} draws random numbers, which would be the same at every replay")
        if any(r.alias_info is None and "Tensor" in str(r.type) for r in func._schema.returns):
            self.refuse(f"{func} allocates memory")

    def _check_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor) and _storage(tensor) not in self._memory.written:
                    self.refuse(f"{func} writes to what is neither a buffer of the plan nor state that its op changes")

    def _described(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            # Where a temporary lies means nothing, and may change.
            place = value.data_ptr() if _storage(value) in self._memory.known else "temporary"
            return place, tuple(value.shape), value.stride(), value.dtype
        if isinstance(value, (list, tuple)):
            return tuple(self._described(v) for v in value)
        return value


class _Functions(TorchFunctionMode):
    """Sees methods that reach no operator: a CPU tensor's values are read without one."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HOST_READS:
            self._watch.refuse(f"Tensor.{func.__name__} reads a tensor's values on the host")
        return func(*args, **(kwargs or {}))
