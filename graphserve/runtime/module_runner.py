"""Runs the plan of a user's own module: arguments in, launches, fresh results out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec
import torch

from graphserve.artifacts import open_store
from graphserve.kernels.cpu import compiler
from graphserve.kernels.triton.compiled import find_or_compile_kernels
from graphserve.plan.arena import ALIGNMENT
from graphserve.plan.module_plan import ModulePlan, Output, Size
from graphserve.plan.runner import Binder, PlanRunner, StepSize
from graphserve.plan.schema import Plan
from graphserve.plan.symbols import evaluate
from graphserve.runtime.cpp_backend import CppBackend, build_library, lower_to_cpp
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.library_calls import LibraryBackend


class ModuleRunner:
    """Executes a :class:`ModulePlan` on one device.

    Parameters and buffers (``is_fixed``) are read where they are: an update in place is seen by the next call, and one
    that gives a parameter other memory makes the launches be bound anew. There is no packed copy of a weight, so linear
    layers are library calls. Other arguments are copied into buffers of the runner, because launches hold addresses.

    Args:
        module_plan: from :func:`graphserve.compiler.build_module.build_module_plan`.
        is_fixed: for each argument, whether it is expected at the same address in every call.
        device: where all tensors are.

    Attributes:
        module_plan: as given; ``plan`` is its plan as this device runs it.

    Invariant: results are the caller's own; no later call writes into them. Calls from several threads take turns.
    """

    def __init__(self, module_plan: ModulePlan, is_fixed: Sequence[bool], device: torch.device) -> None:
        self.module_plan = module_plan
        self._is_fixed = list(is_fixed)
        self._device = device
        self._lock = threading.Lock()
        self._staging: dict[str, torch.Tensor] = {}  # flat, as large as the largest call so far
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        with torch.inference_mode(False):
            constants = {name: value.to(device) for name, value in module_plan.constants.items()}
        plan, binders = self._lower(module_plan.plan)
        self._runner = PlanRunner(plan, {}, constants, self._view_input, device, binders)

    @property
    def plan(self) -> Plan:
        """The plan as it runs: each launch of the kind that this device gave it."""
        return self._runner.plan

    def launch_kinds(self) -> Counter[str]:
        """Launches of each kind; ``reference`` ones are eager torch calls. Views are no launches."""
        return Counter(launch.kind for launch in self.plan.launches if launch.kind != "view")

    def _lower(self, plan: Plan) -> tuple[Plan, dict[str, Binder]]:
        no_cache = KVCache(plan, 1, 1, torch.device("meta"))
        if self._device.type == "cuda":
            return self._lower_to_triton(plan, no_cache)
        binders: dict[str, Binder] = {"library": LibraryBackend()}
        if compiler() is not None:
            lowered = lower_to_cpp(plan, no_cache)
            binders["cpp"] = CppBackend(lowered, {}, build_library(lowered, open_store()))
            plan = lowered.plan
        launches = [
            msgspec.structs.replace(launch, kind="library", kernel="torch.mm")
            if launch.op == "gs.linear.default" and launch.kind == "reference"
            else launch
            for launch in plan.launches
        ]
        return msgspec.structs.replace(plan, launches=launches), binders

    def _lower_to_triton(self, plan: Plan, no_cache: KVCache) -> tuple[Plan, dict[str, Binder]]:
        from graphserve.runtime.cuda_driver import CudaDriver
        from graphserve.runtime.triton_backend import TritonBackend, target_of
        from graphserve.runtime.triton_plan import lower_to_triton

        assert self._stream is not None
        target = target_of(torch.cuda.get_device_capability(self._device))
        lowered = lower_to_triton(plan, no_cache, target)
        compiled = find_or_compile_kernels(lowered.distinct_kernels(), target, open_store())
        driver = CudaDriver()
        driver.use_device(self._device.index or 0)
        backend = TritonBackend(lowered, compiled, driver, self._device, self._stream.cuda_stream)
        return lowered.plan, {"triton": backend, "library": backend}

    def __call__(self, arguments: Sequence[Any]) -> list[Any]:
        """One call of the module with its flat arguments; flat results in new memory."""
        # Buffers that were made in inference mode could not be written outside it.
        with self._lock, torch.inference_mode(False), torch.no_grad(), self._on_own_stream():
            place = self.module_plan.size_argument
            tokens = 1 if place is None else _size_at(arguments[place[0]], place[1])
            self._place(arguments)
            tensors = iter(self._runner.run(StepSize((tokens, 0, 0))))
            return [self._result(output, tensors, tokens) for output in self.module_plan.outputs]

    def _on_own_stream(self) -> AbstractContextManager[object]:
        """Kernels are bound to the stream that was current when they were made; a caller on another one waits."""
        if self._stream is None or torch.cuda.current_stream(self._device) == self._stream:
            return nullcontext()
        return _OtherStream(torch.cuda.current_stream(self._device), self._stream)

    def _place(self, arguments: Sequence[Any]) -> None:
        inputs = self._runner.inputs
        for name, is_fixed, value in zip(self.module_plan.arguments, self._is_fixed, arguments, strict=True):
            if name is None:
                continue
            if is_fixed and value.is_contiguous() and value.data_ptr() % ALIGNMENT == 0:
                if name not in inputs or inputs[name].data_ptr() != value.data_ptr():
                    inputs[name] = value.detach()
                    self._staging.pop(name, None)
                    self._runner.invalidate()
                continue
            flat = self._staging.get(name)
            if flat is None or flat.numel() < value.numel():
                flat = torch.empty(value.numel(), dtype=value.dtype, device=self._device)
                self._staging[name] = inputs[name] = flat
                self._runner.invalidate()
            flat[: value.numel()].view(value.shape).copy_(value)

    def _view_input(self, name: str, tensor: torch.Tensor, size: StepSize) -> torch.Tensor:
        if name not in self._staging:
            return tensor
        shape = [evaluate(dim, size.num_tokens, 0) for dim in self.module_plan.plan.inputs[name].shape]
        count = 1
        for dim in shape:
            count *= dim
        return tensor[:count].view(shape)

    def _result(self, output: Output | None, tensors: Any, tokens: int) -> Any:
        if output is None:
            return None
        if output.dtype is None:
            assert output.number is not None
            return _at(output.number, tokens)
        shape, stride = ([_at(size, tokens) for size in sizes] for sizes in (output.shape, output.stride))
        fresh = torch.empty_strided(shape, stride, dtype=output.dtype, device=self._device)
        return fresh.copy_(next(tensors))


class _OtherStream:
    """Runs its body on ``own``, after what ``callers`` holds and before what comes to it later."""

    def __init__(self, callers: torch.cuda.Stream, own: torch.cuda.Stream) -> None:
        self._callers, self._own = callers, own
        self._switch = torch.cuda.stream(own)

    def __enter__(self) -> None:
        self._own.wait_stream(self._callers)
        self._switch.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._switch.__exit__(*error)
        self._callers.wait_stream(self._own)


def _size_at(value: Any, dim: int) -> int:
    return int(value.shape[dim] if isinstance(value, torch.Tensor) else value)


def _at(size: Size, tokens: int) -> int:
    return size if isinstance(size, int) else size.at(tokens, 0)
