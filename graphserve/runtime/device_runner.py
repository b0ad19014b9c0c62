"""Steps on a device, tokens included: the host submits a step and takes its result later.

A step that fits a bucket is replayed from a recording (a CUDA graph, or the recorder that stands in for one); larger
ones launch the same plan one launch after the other. Only :meth:`SubmittedStep.result` waits for the device.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import numpy as np
import torch

from graphserve.errors import ConfigError
from graphserve.kernels import register_all
from graphserve.kernels.step_rules import STOPPED
from graphserve.plan.runner import Arena, Binder, BoundPlan, PlanRunner, StepSize
from graphserve.plan.schema import Plan
from graphserve.progress import phase
from graphserve.runtime.buckets import CaptureBuckets
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.sampler import adjust_logits, top_logprobs
from graphserve.runtime.step_fields import arena_bytes
from graphserve.runtime.step_graphs import GraphKey, Recording, StepGraphs
from graphserve.runtime.step_input import (
    ALL_LOGPROBS,
    INVALID_TOKEN,
    NO_LOGPROBS,
    SamplingInput,
    StepInput,
    StepOutput,
    TokenLogprobs,
)
from graphserve.runtime.step_inputs_ring import StepInputsRing, list_ids
from graphserve.runtime.step_plan import LISTS, VARIANTS, StepLimits, StepPlan, Variant, step_plan

logger = logging.getLogger(__name__)

_MAX_BOUND = 64  # step sizes whose launches are kept bound without a recording


class Lowering(Protocol):
    """Gives launches their kernels."""

    def lower(
        self, plans: Sequence[Plan], kv_cache: KVCache, table_len: int
    ) -> Sequence[tuple[Plan, dict[str, Binder]]]:
        """What runs for each plan, and the binders of its launches.

        Args:
            kv_cache: its block size and strides are constants of kernels.
            table_len: places of a row of a block table.
        """

    def close(self) -> None:
        """Unload the kernels; bound launches must not be made any more."""


class References:
    """The lowering that leaves every launch to its reference."""

    def lower(self, plans: Sequence[Plan], kv_cache: KVCache, table_len: int) -> list[tuple[Plan, dict[str, Binder]]]:
        return [(plan, {}) for plan in plans]

    def close(self) -> None:
        pass


def variant_of(sampling: SamplingInput, limits: StepLimits) -> Variant:
    """The variant that serves a step's sampling: the smallest that can."""
    wanted = [count for count in sampling.num_logprobs or () if count != NO_LOGPROBS]
    lists = (sum(len(ids) for a in sampling.adjustments if (ids := list_ids(a, name)) is not None) for name in LISTS)
    if (
        sampling.prompt_logprobs
        or any(count == ALL_LOGPROBS or count > limits.max_logprobs for count in wanted)
        or any(total > limits.max_list_ids for total in lists)
    ):
        return "split"
    if any(adjustment.allowed_ids is not None for adjustment in sampling.adjustments):
        return "bitmask"
    if wanted:
        return "logprobs"
    return "greedy" if sampling.is_greedy and not sampling.adjustments else "sample"


class SubmittedStep:
    """A step on its way. Its results wait in the ring until :meth:`result` takes them."""

    def __init__(
        self,
        sampling: SamplingInput,
        ring: torch.Tensor,
        logprobs: _HostLogprobs | _LaterLogprobs | None,
        done: torch.cuda.Event | None,
    ) -> None:
        self.is_taken = False
        self._sampling = sampling
        self._ring = ring
        self._logprobs = logprobs
        self._done = done

    def wait(self) -> None:
        """Until the device has ended the step."""
        if self._done is not None:
            self._done.synchronize()

    def result(self) -> StepOutput:
        """Wait for the step and take its results; called once."""
        assert not self.is_taken, "the result of a step is taken once"
        self.wait()
        output = StepOutput(self._ring[0, : self._sampling.num_rows].tolist())
        if self._logprobs is not None:
            self._logprobs.report(output, self._sampling)
        self.is_taken = True
        return output


class _HostLogprobs:
    """Results of ``gs.top_logprobs`` on their way to the host: ids ``[R, 1 + n]``, log-probabilities, ranks ``[R]``."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors

    def report(self, output: StepOutput, sampling: SamplingInput) -> None:
        ids, values, ranks = (tensor[: sampling.num_rows].tolist() for tensor in self._tensors)
        if sampling.num_logprobs is None:
            return
        output.logprobs = [
            TokenLogprobs(ids[row][: 1 + count], values[row][: 1 + count], ranks[row])
            if count != NO_LOGPROBS and output.token_ids[row] != INVALID_TOKEN
            else None
            for row, count in enumerate(sampling.num_logprobs)
        ]


class _LaterLogprobs:
    """Log-probabilities of a split step, over the whole vocabulary: picked out when the result is taken."""

    def __init__(self, logits: torch.Tensor, sampling: SamplingInput) -> None:
        self._rows = {
            row: logits[row].float().log_softmax(-1)
            for row, count in enumerate(sampling.num_logprobs or ())
            if count != NO_LOGPROBS
        }
        self._prompts = [
            logits[rows.first_row : rows.first_row + len(rows.target_ids)].float().log_softmax(-1)
            for rows in sampling.prompt_logprobs
        ]

    def report(self, output: StepOutput, sampling: SamplingInput) -> None:
        if sampling.num_logprobs is not None:
            output.logprobs = [None] * sampling.num_rows
            for row, logprobs in self._rows.items():
                if output.token_ids[row] != INVALID_TOKEN:
                    output.logprobs[row] = top_logprobs(logprobs, output.token_ids[row], sampling.num_logprobs[row])
        for rows, prompt in zip(sampling.prompt_logprobs, self._prompts, strict=True):
            output.prompt_logprobs[rows.sequence] = [
                top_logprobs(logprobs, target, rows.num_logprobs)
                for logprobs, target in zip(prompt, rows.target_ids.tolist(), strict=True)
            ]


class _Program:
    """One variant's plan and its bound launches by step size."""

    def __init__(self, step: StepPlan, runner: PlanRunner) -> None:
        self.variant = step.variant
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

    def part(self, part: int) -> slice:
        """Which launches belong to a part."""
        return slice(None, self._pause_before) if part == 0 else slice(self._pause_before, None)


class DeviceRunner:
    """Runs whole steps of a model.

    Args:
        model: the compiled model.
        weights: value name → tensor on ``device``, as :func:`~graphserve.runtime.weights.materialize_weights` gives.
        max_in_flight: steps that may be submitted before the first result is taken.
        lowering: which kernels the launches get, by default their references.
        graphs: makes the recordings, given the step scalars of a size; None launches every step eagerly.
        stream: that everything is enqueued on, on CUDA; not the default one, which cannot be captured.
        record_after: how many steps of a size run eagerly before it is recorded although the device is busy; on an idle
            one it is recorded at once.

    Attributes:
        num_variant_steps: steps so far by variant.
        num_eager_steps: those of them that were not replayed.

    Invariant: steps run in the order of :meth:`submit`; a result stays readable until it is taken.
    """

    def __init__(
        self,
        model: Plan,
        weights: dict[str, torch.Tensor],
        device: torch.device,
        max_in_flight: int = 2,
        lowering: Lowering | None = None,
        graphs: Callable[[Callable[[StepSize], Mapping[str, int]]], StepGraphs] | None = None,
        stream: torch.cuda.Stream | None = None,
        record_after: int = 4,
    ) -> None:
        register_all()
        self.plan = model
        self.device = device
        self.max_in_flight = max_in_flight
        self.kv_cache: KVCache | None = None
        self.num_variant_steps: Counter[str] = Counter(dict.fromkeys(VARIANTS, 0))
        self.num_eager_steps = 0
        self._weights = weights
        self._lowering = lowering or References()
        self._make_graphs = graphs
        self._stream = stream
        self._record_after = record_after
        self._num_eager_of: Counter[tuple[Variant, StepSize]] = Counter()
        self._graphs: StepGraphs | None = None
        self._buckets: CaptureBuckets | None = None
        self._programs: dict[Variant, _Program] = {}
        self._recorded: set[tuple[Variant, StepSize]] = set()
        self._submitted: list[SubmittedStep | None] = [None] * max_in_flight
        self._num_steps = 0

    def allocate(
        self,
        num_blocks: int,
        block_size: int,
        largest: StepSize,
        num_lanes: int,
        buckets: CaptureBuckets | None = None,
    ) -> None:
        """Make the KV pool, the step's inputs and room for its largest size; nothing moves afterwards.

        Args:
            num_lanes: requests that run at a time.
            buckets: which sizes are recorded, all of them by default.
        """
        self._buckets = buckets
        # One slot more, for the steps without effect that are run to be recorded.
        self.limits = StepLimits(num_lanes, max_rows=largest.num_rows, num_slots=self.max_in_flight + 1)
        table_len = -(-self.plan.model["max_model_len"] // block_size)
        self._largest = largest
        with self._on_stream():
            self.kv_cache = KVCache(self.plan, num_blocks, block_size, self.device)
            self._inputs = StepInputsRing(self.plan, self.limits, table_len, largest, self.device)
            pinned = self.device.type == "cuda"
            # The device writes results where the host reads them: pinned memory has one address on both.
            self._ring = torch.zeros((self.limits.num_slots, 2, largest.num_rows), dtype=torch.int32, pin_memory=pinned)
            count = 1 + min(self.limits.max_logprobs, int(self.plan.model["vocab_size"]))
            self._host_logprobs = [
                [
                    torch.zeros(shape, dtype=dtype, pin_memory=pinned)
                    for shape, dtype in (
                        ((largest.num_rows, count), torch.int64),
                        ((largest.num_rows, count), torch.float32),
                        ((largest.num_rows,), torch.int64),
                    )
                ]
                for _ in range(self.max_in_flight)
            ]
            self._last_tokens = torch.full((num_lanes + 1,), STOPPED, dtype=torch.int64, device=self.device)
            self._make_programs(table_len)

    def _make_programs(self, table_len: int) -> None:
        assert self.kv_cache is not None
        steps = [step_plan(self.plan, variant, self.limits) for variant in VARIANTS]
        lowered = self._lowering.lower([step.plan for step in steps], self.kv_cache, table_len)
        inputs = {**self._inputs.names, "step.last_tokens": self._last_tokens, "step.ring": self._ring}
        for layer, (keys, values) in enumerate(self.kv_cache.layers):
            inputs |= {f"kv_k.{layer}": keys, f"kv_v.{layer}": values}
        self._arena = Arena(self.device)
        # One arena for all variants; it must not grow, and so move, once the first launches are bound.
        tokens, rows, _ = self._largest
        self._arena.reserve(arena_bytes(self.plan, self.limits, tokens, rows))
        self._programs = {
            step.variant: _Program(
                step, PlanRunner(plan, self._weights, inputs, self._inputs.view, self.device, binders, self._arena)
            )
            for step, (plan, binders) in zip(steps, lowered, strict=True)
        }
        for program in self._programs.values():
            program.runner.reserve(tokens, rows)
        if self._make_graphs is not None:
            groups = len(self.plan.cache_groups)
            tables = {f"B_{group}": table_len for group in range(groups)}
            self._graphs = self._make_graphs(lambda size: {"T": size[0], "R": size[1], "S": size[2], **tables})

    def submit(self, step: StepInput) -> SubmittedStep:
        """Enqueue a step.

        Raises:
            ConfigError: no KV cache was allocated.
        """
        if self.kv_cache is None:
            raise ConfigError("submit before allocate: the model has nowhere to keep keys and values")
        slot = self._num_steps % self.max_in_flight
        before = self._submitted[slot]
        assert before is None or before.is_taken, f"more than {self.max_in_flight} steps in flight"
        variant = variant_of(step.sampling, self.limits)
        size = StepSize((len(step.input_ids), len(step.logits_indices), len(step.seq_lens)))
        with self._on_stream():
            self._record_if_wanted(variant, size)
            self._inputs.write(step, variant, slot)
            logprobs = self._run(variant, size, step.sampling, slot)
            done = self._stream.record_event() if self._stream is not None else None
            submitted = SubmittedStep(step.sampling, self._ring[slot], logprobs, done)
        self._submitted[slot] = submitted
        self._num_steps += 1
        self.num_variant_steps[variant] += 1
        return submitted

    def close(self) -> None:
        """Wait for submitted steps and free weights, KV cache and buffers."""
        for submitted in self._submitted:
            if submitted is not None and not submitted.is_taken:
                # A step that failed has been, or will be, reported by its result; here it must only have ended.
                with suppress(RuntimeError):
                    submitted.wait()
        if self._graphs is not None:
            self._graphs.close()
        for program in self._programs.values():
            program.runner.release()
        self._programs.clear()
        self._lowering.close()
        self._graphs = self.kv_cache = None

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Tensors are made for inference, and work goes to the runner's stream."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            yield

    @property
    def workspace_bytes(self) -> int:
        """Device memory of inputs, state and buffers; kernels' scratch memory is not counted."""
        return self._inputs.num_bytes + self._last_tokens.nbytes + self._arena.memory.numel()

    @property
    def is_idle(self) -> bool:
        """Whether no step is on its way."""
        return all(submitted is None or submitted.is_taken for submitted in self._submitted)

    def record(self, sizes: Iterable[StepSize], variants: Sequence[Variant]) -> None:
        """Record steps ahead of time, the largest first, so that the smaller ones fit into its memory."""
        ordered = sorted(sizes, reverse=True)
        with self._on_stream(), phase("record steps", total=len(ordered) * len(variants), unit="steps") as work:
            for size in ordered:
                for variant in variants:
                    self._record(variant, size)
                    work.advance()

    def _record_if_wanted(self, variant: Variant, size: StepSize) -> None:
        if self._buckets is not None and not self._buckets.is_captured(*size):
            return
        if self.is_idle or self._num_eager_of[variant, size] >= self._record_after:
            self._record(variant, size)

    def _record(self, variant: Variant, size: StepSize) -> None:
        if self._graphs is None or (variant, size) in self._recorded:
            return
        self._recorded.add((variant, size))  # also if there is no memory for it: it is not tried again
        program = self._programs[variant]
        dead = _dead_step(size, len(self.plan.cache_groups), self.limits.num_lanes)
        self._inputs.write(dead, variant, self.max_in_flight)
        bound = program.bound(size)
        for part in range(program.num_parts):
            launches = bound.launches[program.part(part)]
            recording = Recording(launches, bound.tensors, lambda: self._current(program, size))
            if not self._graphs.record(GraphKey(variant, part, size), recording):
                return

    def _current(self, program: _Program, size: StepSize) -> dict[str, torch.Tensor]:
        runner = program.runner
        inputs = {name: self._inputs.view(name, tensor, size) for name, tensor in runner.inputs.items()}
        return {**runner.weights, **inputs, "the plan's buffers": self._arena.memory}

    def _run(
        self, variant: Variant, size: StepSize, sampling: SamplingInput, slot: int
    ) -> _HostLogprobs | _LaterLogprobs | None:
        program = self._programs[variant]
        self._run_part(program, 0, size)
        if variant == "split":
            logits, copy = program.bound(size).outputs
            later = _LaterLogprobs(logits, sampling)
            for adjustment in sampling.adjustments:
                adjust_logits(copy[adjustment.row], adjustment)
            self._run_part(program, 1, size)
            return later
        outputs = program.bound(size).outputs
        if not outputs:
            return None
        hosts = [host[: size.num_rows] for host in self._host_logprobs[slot]]
        for host, output in zip(hosts, outputs, strict=True):
            host.copy_(output, non_blocking=True)
        return _HostLogprobs(hosts)

    def _run_part(self, program: _Program, part: int, size: StepSize) -> None:
        key = GraphKey(program.variant, part, size)
        if self._graphs is not None and key in self._graphs:
            self._graphs.replay(key)
            return
        if part == 0:
            self.num_eager_steps += 1
            self._num_eager_of[program.variant, size] += 1
        for _, action in program.bound(size).launches[program.part(part)]:
            action()


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
