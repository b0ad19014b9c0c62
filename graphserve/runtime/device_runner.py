"""Steps on a device, tokens included: the host submits a step and takes its result later.

A step that fits a bucket is replayed from a recording (a CUDA graph, or the recorder that stands in for one); larger
ones launch the same plan one launch after the other. Only :meth:`SubmittedStep.result` waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from graphserve.errors import ConfigError
from graphserve.kernels import register_all
from graphserve.kernels.step_rules import STOPPED
from graphserve.plan.runner import BoundPlan, StepSize
from graphserve.plan.schema import Plan
from graphserve.progress import phase
from graphserve.runtime.buckets import CaptureBuckets
from graphserve.runtime.choices import MeasuredChoices
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.sampler import adjust_logits
from graphserve.runtime.step_input import ALL_LOGPROBS, NO_LOGPROBS, SamplingInput, StepInput
from graphserve.runtime.step_inputs_ring import StepInputsRing, list_ids
from graphserve.runtime.step_plan import LISTS, VARIANTS, StepLimits, Variant
from graphserve.runtime.step_programs import GraphsMaker, Lowering, References, StepPrograms
from graphserve.runtime.submitted_step import HostLogprobs, LaterLogprobs, StepLogprobs, SubmittedStep


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


class DeviceRunner:
    """Runs whole steps of a model.

    Args:
        model: the compiled model.
        weights: value name → tensor on ``device``, as :func:`~graphserve.runtime.weights.materialize_weights` gives.
        max_in_flight: steps that may be submitted before the first result is taken.
        lowering: which kernels the launches get, by default their references.
        graphs: makes the recordings, given the step scalars of a size; None launches every step eagerly.
        stream: that everything is enqueued on, on CUDA; not the default one, which cannot be captured. None elsewhere.
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
        graphs: GraphsMaker | None = None,
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
        self.stream = stream
        self._record_after = record_after
        self._num_eager_of: Counter[tuple[Variant, StepSize]] = Counter()
        self._buckets: CaptureBuckets | None = None
        self._programs: StepPrograms | None = None
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
            state = {"step.last_tokens": self._last_tokens, "step.ring": self._ring}
            for layer, (keys, values) in enumerate(self.kv_cache.layers):
                state |= {f"kv_k.{layer}": keys, f"kv_v.{layer}": values}
            self._programs = StepPrograms(
                self.plan,
                self._weights,
                self._inputs,
                state,
                self.limits,
                largest,
                self.kv_cache,
                table_len,
                self.device,
                self._lowering,
                self._make_graphs,
            )

    @property
    def workspace_bytes(self) -> int:
        """Device memory of inputs, state and buffers; kernels' scratch memory is not counted."""
        assert self._programs is not None, "there is no KV cache"
        return self._inputs.num_bytes + self._last_tokens.nbytes + self._programs.arena_bytes

    @property
    def can_record(self) -> bool:
        """Whether steps are recorded, and every launch has its kernel by now."""
        return self._programs is not None and self._programs.can_record

    @property
    def num_graphs(self) -> int:
        """Recordings of steps or of their parts."""
        return 0 if self._programs is None else self._programs.num_graphs

    @property
    def graph_bytes(self) -> int:
        """Device memory that recordings took, measured with everything else in place."""
        return 0 if self._programs is None else self._programs.graph_bytes

    @property
    def is_idle(self) -> bool:
        """Whether no step is on its way."""
        return all(submitted is None or submitted.is_taken for submitted in self._submitted)

    def submit(self, step: StepInput) -> SubmittedStep:
        """Enqueue a step.

        Raises:
            ConfigError: no KV cache was allocated.
        """
        if self._programs is None:
            raise ConfigError("submit before allocate: the model has nowhere to keep keys and values")
        slot = self._num_steps % self.max_in_flight
        before = self._submitted[slot]
        assert before is None or before.is_taken, f"more than {self.max_in_flight} steps in flight"
        variant = variant_of(step.sampling, self.limits)
        size = StepSize((len(step.input_ids), len(step.logits_indices), len(step.seq_lens)))
        with self._on_stream():
            self._programs.complete()
            if self._should_record(variant, size):
                self._programs.record(variant, size)
            self._inputs.write(step, variant, slot)
            logprobs = self._run(self._programs, variant, size, step.sampling, slot)
            done = self.stream.record_event() if self.stream is not None else None
            submitted = SubmittedStep(step.sampling, self._ring[slot], logprobs, done)
        self._submitted[slot] = submitted
        self._num_steps += 1
        self.num_variant_steps[variant] += 1
        return submitted

    def record(self, sizes: Iterable[StepSize], variants: Sequence[Variant]) -> None:
        """Record steps ahead of time, the largest first, so that the smaller ones fit into its memory."""
        assert self._programs is not None, "there is no KV cache"
        ordered = sorted(sizes, reverse=True)
        with self._on_stream(), phase("record steps", total=len(ordered) * len(variants), unit="steps") as work:
            for size in ordered:
                for variant in variants:
                    self._programs.record(variant, size)
                    work.advance()

    def use_choices(self, choices: MeasuredChoices) -> None:
        """Run decode steps so from now on; recordings are forgotten. No step may be on its way."""
        assert self._programs is not None and self.is_idle, "there is no KV cache, or a step on its way"
        self._programs.use_choices(choices)

    def bound(self, variant: Variant, size: StepSize) -> BoundPlan:
        """The launches of a step; they read the inputs of the step that was submitted last."""
        assert self._programs is not None, "there is no KV cache"
        with self._on_stream():
            return self._programs.bound(variant, size)

    def close(self) -> None:
        """Wait for submitted steps and free weights, KV cache and buffers."""
        for submitted in self._submitted:
            if submitted is not None and not submitted.is_taken:
                # A step that failed has been, or will be, reported by its result; here it must only have ended.
                with suppress(RuntimeError):
                    submitted.wait()
        if self._programs is not None:
            self._programs.close()
        self._programs = self.kv_cache = None

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Tensors are made for inference, and work goes to the runner's stream."""
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            yield

    def _should_record(self, variant: Variant, size: StepSize) -> bool:
        if self._buckets is not None and not self._buckets.is_captured(*size):
            return False
        return self.is_idle or self._num_eager_of[variant, size] >= self._record_after

    def _run(
        self, programs: StepPrograms, variant: Variant, size: StepSize, sampling: SamplingInput, slot: int
    ) -> StepLogprobs | None:
        if not programs.run(variant, 0, size):
            self.num_eager_steps += 1
            self._num_eager_of[variant, size] += 1
        outputs = programs.bound(variant, size).outputs
        if variant == "split":
            logits, copy = outputs
            later = LaterLogprobs(logits, sampling)
            for adjustment in sampling.adjustments:
                adjust_logits(copy[adjustment.row], adjustment)
            programs.run(variant, 1, size)
            return later
        if not outputs:
            return None
        hosts = [host[: size.num_rows] for host in self._host_logprobs[slot]]
        for host, output in zip(hosts, outputs, strict=True):
            host.copy_(output, non_blocking=True)
        return HostLogprobs(hosts)
