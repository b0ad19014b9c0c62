"""A model's step in every variant: plans with their kernels, bound to addresses by size, and recorded.

Nothing here knows requests or results: :class:`~graphserve.runtime.device_runner.DeviceRunner` decides which step runs
and what is recorded when.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np
import torch

from graphserve.plan.runner import Arena, Binder, BoundPlan, PlanRunner, StepSize
from graphserve.plan.schema import Plan
from graphserve.runtime.choices import MeasuredChoices
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.step_fields import arena_bytes
from graphserve.runtime.step_graphs import GraphKey, Recording, StepGraphs
from graphserve.runtime.step_input import SamplingInput, StepInput
from graphserve.runtime.step_inputs_ring import StepInputsRing
from graphserve.runtime.step_plan import VARIANTS, StepLimits, StepPlan, Variant, step_plan

_MAX_BOUND = 64  # step sizes whose launches are kept bound without a recording

# Given the step scalars of a size, makes what keeps recordings.
GraphsMaker = Callable[[Callable[[StepSize], Mapping[str, int]]], StepGraphs]


class Lowering(Protocol):
    """Gives launches their kernels.

    Attributes:
        is_complete: every launch has its kernel; until then some run as plain torch, which cannot be recorded.
    """

    is_complete: bool

    def lower(
        self, plans: Sequence[Plan], kv_cache: KVCache, table_len: int
    ) -> Sequence[tuple[Plan, dict[str, Binder]]]:
        """What runs for each plan, and the binders of its launches.

        Args:
            kv_cache: its block size and strides are constants of kernels.
            table_len: places of a row of a block table.
        """

    def complete(self) -> bool:
        """Take kernels that were built since the launches were bound; whether there are any."""

    def use_choices(self, choices: MeasuredChoices) -> None:
        """Bind decode steps so from now on."""

    def close(self) -> None:
        """Unload the kernels; bound launches must not be made any more."""


class References:
    """The lowering that leaves every launch to its reference, for devices whose recorder takes these."""

    is_complete = True

    def lower(self, plans: Sequence[Plan], kv_cache: KVCache, table_len: int) -> list[tuple[Plan, dict[str, Binder]]]:
        return [(plan, {}) for plan in plans]

    def complete(self) -> bool:
        return False

    def use_choices(self, choices: MeasuredChoices) -> None:
        pass

    def close(self) -> None:
        pass


class _Program:
    """One variant's plan and its bound launches by step size."""

    def __init__(self, step: StepPlan, runner: PlanRunner) -> None:
        self.runner = runner
        self._pause_before = step.pause_before
        self._bound: OrderedDict[StepSize, BoundPlan] = OrderedDict()

    @property
    def num_parts(self) -> int:
        return 1 if self._pause_before is None else 2

    def bound(self, size: StepSize) -> BoundPlan:
        if size not in self._bound:
            self._bound[size] = self.runner.bind(size)
            if len(self._bound) > _MAX_BOUND:
                self._bound.popitem(last=False)
        self._bound.move_to_end(size)
        return self._bound[size]

    def forget(self) -> None:
        """Bind every size anew when it comes next."""
        self._bound.clear()

    def part(self, part: int) -> slice:
        """Which launches belong to a part."""
        return slice(None, self._pause_before) if part == 0 else slice(self._pause_before, None)


class StepPrograms:
    """All variants of a model's step over the same inputs and buffers.

    Args:
        model: the compiled model.
        weights: value name → tensor on the device.
        inputs: of a step.
        state: what steps leave for later ones, by name: last tokens, output ring, KV cache.
        limits: sizes that are the same in every step.
        largest: step there is.
        kv_cache: of the model.
        table_len: places of a row of a block table.
        lowering: which kernels the launches get; closed with the programs.
        make_graphs: None launches every step eagerly.

    Invariant: buffers and inputs never move, so bound launches and recordings stay right.
    """

    def __init__(
        self,
        model: Plan,
        weights: dict[str, torch.Tensor],
        inputs: StepInputsRing,
        state: Mapping[str, torch.Tensor],
        limits: StepLimits,
        largest: StepSize,
        kv_cache: KVCache,
        table_len: int,
        device: torch.device,
        lowering: Lowering,
        make_graphs: GraphsMaker | None,
    ) -> None:
        self._inputs = inputs
        self._limits = limits
        self._num_groups = len(model.cache_groups)
        self._lowering = lowering
        self._recorded: set[tuple[Variant, StepSize]] = set()
        self._programs: dict[Variant, _Program] = {}
        self._graphs: StepGraphs | None = None
        steps = [step_plan(model, variant, limits) for variant in VARIANTS]
        tensors = {**inputs.names, **state}
        tokens, rows, _ = largest
        with ExitStack() as undo:
            undo.callback(lowering.close)  # which may have begun to build kernels in the background
            lowered = lowering.lower([step.plan for step in steps], kv_cache, table_len)
            # One arena for all variants; it must not grow, and so move, once the first launches are bound.
            self._arena = Arena(device)
            self._arena.reserve(arena_bytes(model, limits, tokens, rows))
            for step, (plan, binders) in zip(steps, lowered, strict=True):
                runner = PlanRunner(plan, weights, tensors, inputs.view, device, binders, self._arena)
                runner.reserve(tokens, rows)
                self._programs[step.variant] = _Program(step, runner)
            if make_graphs is not None:
                tables = {f"B_{group}": table_len for group in range(self._num_groups)}
                self._graphs = make_graphs(lambda size: {"T": size[0], "R": size[1], "S": size[2], **tables})
            undo.pop_all()

    @property
    def arena_bytes(self) -> int:
        """Device memory of the buffers."""
        return self._arena.memory.numel()

    @property
    def can_record(self) -> bool:
        """Whether there are recordings, and every launch has its kernel by now."""
        return self._graphs is not None and self._lowering.is_complete

    @property
    def num_graphs(self) -> int:
        """Recordings so far; a split step has two."""
        return 0 if self._graphs is None else len(self._graphs)

    @property
    def graph_bytes(self) -> int:
        """Device memory that recordings took."""
        return 0 if self._graphs is None else self._graphs.num_bytes

    def bound(self, variant: Variant, size: StepSize) -> BoundPlan:
        """The launches of a step, as they are recorded or launched eagerly. They read the inputs written last."""
        return self._programs[variant].bound(size)

    def run(self, variant: Variant, part: int, size: StepSize) -> bool:
        """Replay a part of a step, or launch it eagerly where it is not recorded.

        Returns:
            Whether it was replayed.
        """
        key = GraphKey(variant, part, size)
        if self._graphs is not None and key in self._graphs:
            self._graphs.replay(key)
            return True
        program = self._programs[variant]
        for _, action in program.bound(size).launches[program.part(part)]:
            action()
        return False

    def record(self, variant: Variant, size: StepSize) -> None:
        """Record a step, unless this was tried before. It runs once, with the inputs of a step without effect."""
        if self._graphs is None or not self.can_record or (variant, size) in self._recorded:
            return
        self._recorded.add((variant, size))  # also if there is no memory for it: it is not tried again
        program = self._programs[variant]
        dead = _dead_step(size, self._num_groups, self._limits.num_lanes)
        self._inputs.write(dead, variant, self._limits.num_slots - 1)
        bound = program.bound(size)
        for part in range(program.num_parts):
            launches = bound.launches[program.part(part)]
            recording = Recording(launches, bound.tensors, lambda: self._current(program, size))
            if not self._graphs.record(GraphKey(variant, part, size), recording):
                return

    def complete(self) -> None:
        """Between two steps: use kernels that were built since the last one."""
        if not self._lowering.is_complete and self._lowering.complete():
            self._bind_anew()

    def use_choices(self, choices: MeasuredChoices) -> None:
        """Bind and record decode steps so from now on. No step may be on its way."""
        self._lowering.use_choices(choices)
        if self._graphs is not None:
            self._graphs.close()
        self._recorded.clear()
        self._bind_anew()

    def _bind_anew(self) -> None:
        for program in self._programs.values():
            program.forget()

    def close(self) -> None:
        """Forget recordings and launches, unload kernels, give buffers back. No step may be on its way."""
        if self._graphs is not None:
            self._graphs.close()
        for program in self._programs.values():
            program.runner.release()
        self._programs.clear()
        self._lowering.close()

    def _current(self, program: _Program, size: StepSize) -> dict[str, torch.Tensor]:
        runner = program.runner
        inputs = {name: self._inputs.view(name, tensor, size) for name, tensor in runner.inputs.items()}
        return {**runner.weights, **inputs, "the plan's buffers": self._arena.memory}


def _dead_step(size: StepSize, num_groups: int, dead_lane: int) -> StepInput:
    """A step of a size that changes nothing: no sequence has a token, slots are null, lanes dead."""
    tokens, rows, seqs = size
    return StepInput(
        input_ids=np.zeros(tokens, np.int64),
        positions=np.zeros(tokens, np.int64),
        query_start_loc=np.zeros(seqs + 1, np.int32),
        seq_lens=np.zeros(seqs, np.int32),
        block_tables=[np.zeros((seqs, 1), np.int32)] * num_groups,
        slot_mappings=[np.zeros(tokens, np.int64)] * num_groups,
        logits_indices=np.zeros(rows, np.int64),
        token_lanes=np.full(tokens, dead_lane, np.int32),
        row_lanes=np.full(rows, dead_lane, np.int32),
        sampling=SamplingInput(0),
        num_tokens=0,
        num_sequences=0,
        num_logits_rows=0,
    )
