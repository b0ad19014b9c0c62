"""Which requests run in the next step, and with how many tokens. Plain Python: no torch, no clock, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from graphserve.engine.kv_cache_manager import KVCacheManager
from graphserve.engine.request import Request, RequestStatus


class SchedulerLimits(msgspec.Struct, frozen=True):
    """Bounds of one step.

    Attributes:
        max_num_seqs: most requests that run at a time.
        max_num_batched_tokens: most tokens in one step.
        max_logits_rows: most logits rows in one step, at least ``max_num_seqs``; it bounds the memory of prompt
            log-probabilities, whose prompts are cut into smaller chunks.
        enable_chunked_prefill: a prompt may be spread over several steps.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_logits_rows: int
    enable_chunked_prefill: bool = True


class ScheduledRequest(msgspec.Struct):
    """A request's part in a step: tokens ``start .. start + num_tokens - 1`` of its sequence.

    ``samples`` says whether that reaches the last token, so that the next one is sampled.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class SchedulerOutput(msgspec.Struct):
    """One step: decoding requests first, then prefills; each in the order of arrival.

    ``exhausted`` are requests that ran alone and still need more blocks than the pool has: they can never go on.
    ``must_wait``: nothing was scheduled, because that takes what only the end of the steps in flight brings.
    """

    scheduled: list[ScheduledRequest]
    exhausted: list[Request]
    must_wait: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)


class Scheduler:
    """First come, first served, with preemption by recompute.

    Every request has computed tokens and known tokens; a step computes some of the difference. Running requests go
    before waiting ones, decodes before prefills. If blocks lack, the request that arrived last loses all of its blocks
    and waits at the front of the queue; so the one that arrived first always makes progress.

    A step that :meth:`schedule` has given is in flight until :meth:`retire`. More may be scheduled meanwhile: all that
    is said about a request's length counts the tokens still being sampled. What needs to know more waits for the flight
    to end: a row whose sampling reads those tokens, and a pool without free blocks, since some may come back and taking
    blocks from a request needs it to be at rest.

    Invariant: waiting requests hold neither blocks nor a lane. ``running`` and ``waiting`` are each in the order of
    arrival, and every running request arrived before every waiting one. A request that ends while steps with it are
    in flight keeps its blocks and its lane until the last of them has retired.
    """

    def __init__(self, limits: SchedulerLimits, kv: KVCacheManager) -> None:
        assert limits.max_logits_rows >= limits.max_num_seqs
        self.limits = limits
        self.kv = kv
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.num_preemptions = 0
        self.in_flight: deque[list[ScheduledRequest]] = deque()
        self._leaving: list[Request] = []  # finished, but still in a step in flight
        self._free_lanes = list(reversed(range(limits.max_num_seqs)))

    def add(self, request: Request) -> None:
        """Queue a new request, which must have arrived after all others."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is. Its blocks come back when no step in flight writes to them."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is not RequestStatus.FINISHED:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        if request.num_steps_in_flight:
            self._leaving.append(request)
        else:
            self._release(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step and take the blocks it writes to. The step is in flight if it is not empty."""
        if self.in_flight and any(
            r.reads_output and r.num_placeholders and r.num_tokens_to_compute for r in self.running
        ):
            return SchedulerOutput([], [], must_wait=True)
        step = _StepInProgress(self.limits)
        exhausted: list[Request] = []
        has_preempted = False
        decoding = [r for r in self.running if r.is_decoding]
        prefilling = [r for r in self.running if not r.is_decoding]
        for request in decoding + prefilling:
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted by one before it
            num_tokens = step.num_tokens_for(request)
            if num_tokens == 0:
                continue
            while not self.kv.allocate(request, num_tokens):
                if self.in_flight:
                    return SchedulerOutput([], [], must_wait=True)
                if len(self.running) == 1:
                    # Alone, and the pool is too small: a smaller chunk needs fewer blocks in windowed groups.
                    num_tokens //= 2
                    if num_tokens == 0:
                        exhausted.append(request)
                        break
                    continue
                victim = self.running[-1]
                step.remove(victim)
                self._preempt(victim)
                has_preempted = True
                if victim is request:
                    num_tokens = 0
                    break
            if num_tokens:
                step.add(request, num_tokens)
        if not has_preempted and not exhausted:
            self._admit(step, exhausted)
        scheduled = step.in_order()
        for item in scheduled:
            item.request.num_steps_in_flight += 1
            item.request.num_scheduled_tokens = item.end
            item.request.num_placeholders += item.samples
        if scheduled:
            self.in_flight.append(scheduled)
        return SchedulerOutput(scheduled, exhausted)

    def retire(self) -> list[ScheduledRequest]:
        """The oldest step in flight has ended: its parts, whose sampled tokens the caller adds to their requests."""
        scheduled = self.in_flight.popleft()
        for item in scheduled:
            request = item.request
            request.num_steps_in_flight -= 1
            request.num_computed_tokens = item.end
            request.num_placeholders -= item.samples
            if request.status is not RequestStatus.FINISHED:
                self.kv.retire(request)
            elif not request.num_steps_in_flight:
                self._leaving.remove(request)
                self._release(request)
        return scheduled

    def check(self) -> None:
        """Assert the invariants of queues, lanes, steps in flight and blocks."""
        assert len(self.running) <= self.limits.max_num_seqs
        arrivals = [r.arrival for r in [*self.running, *self.waiting]]
        assert arrivals == sorted(arrivals), "the order of arrival is lost"
        assert all(r.status is RequestStatus.RUNNING for r in self.running)
        assert all(not r.block_tables and r.num_scheduled_tokens == 0 for r in self.waiting), "waiting, with blocks"
        assert all(r.lane is None and not r.num_steps_in_flight for r in self.waiting), "waiting, with a lane"
        holders = [*self.running, *self._leaving]
        lanes = [*self._free_lanes, *(r.lane for r in holders)]
        assert set(lanes) == set(range(self.limits.max_num_seqs)) and len(lanes) == len(set(lanes)), "lanes are lost"
        in_flight = [item.request for step in self.in_flight for item in step]
        assert all(r.num_steps_in_flight == in_flight.count(r) for r in holders), "steps in flight are miscounted"
        assert all(r in holders for r in in_flight), "a step in flight writes for a request that has gone"
        for request in holders:
            assert request.num_computed_tokens <= request.num_scheduled_tokens <= request.num_tokens
        self.kv.check(holders)

    def _admit(self, step: _StepInProgress, exhausted: list[Request]) -> None:
        """Start waiting requests, in order, while tokens, rows, lanes and blocks last."""
        while self.waiting and self._free_lanes:
            request = self.waiting[0]
            num_tokens = step.num_tokens_for(request)
            if num_tokens == 0:
                break
            needed = self.kv.num_blocks_for(request.num_tokens, num_tokens)
            if (self.running or self.in_flight) and needed > self.kv.pool.num_free:
                break  # starting a prompt whose end does not fit would only bring about a preemption
            while num_tokens and not self.kv.allocate(request, num_tokens):
                num_tokens //= 2  # nothing else runs: see schedule()
            if num_tokens == 0:
                exhausted.append(request)
                break
            self.waiting.popleft()
            request.status = RequestStatus.RUNNING
            request.lane = self._free_lanes.pop()
            self.running.append(request)
            step.add(request, num_tokens)

    def _preempt(self, request: Request) -> None:
        assert self.running[-1] is request and not request.num_steps_in_flight
        self.running.pop()
        self._release(request)
        request.num_computed_tokens = 0
        request.num_scheduled_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self.kv.free(request)
        if request.lane is not None:
            self._free_lanes.append(request.lane)
            request.lane = None


class _StepInProgress:
    """The budget that is left and what has been scheduled so far."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._num_tokens_left = limits.max_num_batched_tokens
        # One row is set aside for each sequence; the rest may go to prompt positions.
        self._num_prompt_rows_left = limits.max_logits_rows - limits.max_num_seqs
        self._scheduled: dict[int, ScheduledRequest] = {}

    def num_tokens_for(self, request: Request) -> int:
        """Tokens of ``request`` that fit into this step, 0 for none."""
        wanted = request.num_tokens_to_compute
        num_tokens = min(wanted, self._num_tokens_left)
        if num_tokens < wanted and not self._limits.enable_chunked_prefill:
            return 0
        if request.wants_prompt_logprobs:
            num_tokens = min(num_tokens, self._num_prompt_rows_left + 1)
        return num_tokens

    def add(self, request: Request, num_tokens: int) -> None:
        start = request.num_scheduled_tokens
        samples = start + num_tokens == request.num_tokens
        self._scheduled[request.arrival] = ScheduledRequest(request, start, num_tokens, samples)
        self._num_tokens_left -= num_tokens
        if request.wants_prompt_logprobs:
            self._num_prompt_rows_left -= num_tokens - 1

    def remove(self, request: Request) -> None:
        """Undo :meth:`add`, if it was done."""
        item = self._scheduled.pop(request.arrival, None)
        if item is not None:
            self._num_tokens_left += item.num_tokens
            if request.wants_prompt_logprobs:
                self._num_prompt_rows_left += item.num_tokens - 1

    def in_order(self) -> list[ScheduledRequest]:
        items: Iterable[ScheduledRequest] = self._scheduled.values()
        return sorted(items, key=lambda item: (not item.request.is_decoding, item.request.arrival))
