"""A device's stream without a device: steps run some time after they were submitted, one after the other.

Time is logical and random, from a seed: whenever the engine calls, and whenever a test lets time pass, any number of
the submitted steps may run. A step that the engine waits for has run. When a step runs, all that it reads and writes
must still belong to the request for which it was submitted.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from graphserve.engine import model_executor
from graphserve.engine.executor import Executor, ExecutorStats, StepSizes
from graphserve.engine.kv_cache_manager import first_visible_token
from graphserve.engine.model_executor import ModelExecutor
from graphserve.engine.request import Request
from graphserve.engine.scheduler import Scheduler
from graphserve.runtime.buckets import Buckets
from graphserve.runtime.step_input import CARRIED, StepInput, StepOutput


class QueuedStep:
    """A submitted step: its result or its failure, once it has run."""

    def __init__(self, stream: FakeStream, step_input: StepInput, check: Callable[[], None]) -> None:
        self._stream = stream
        self._step_input = step_input
        self._check = check
        self._output: StepOutput | None = None
        self._error: Exception | None = None

    def run(self, executor: Executor) -> None:
        self._check()
        try:
            self._output = executor.submit(self._step_input).result()
        except Exception as error:  # as on a device: it shows when somebody waits for the step
            self._error = error

    def result(self) -> StepOutput:
        self._stream.run_until(self)
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output


class FakeStream:
    """An executor of depth two around a synchronous one.

    ``num_ahead`` counts the steps that were submitted before the result of the one before was taken.
    """

    max_in_flight = 2

    def __init__(self, executor: Executor, rng: random.Random) -> None:
        self.vocab_size = executor.vocab_size
        self.cache_groups = executor.cache_groups
        self.kv_bytes_per_token = executor.kv_bytes_per_token
        self.num_ahead = 0
        self._executor = executor
        self._rng = rng
        self._queue: deque[QueuedStep] = deque()
        self._num_untaken = 0
        self._scheduler: Scheduler | None = None
        self._block_size = 0
        self._lane_samplers: dict[int, Request] = {}

    def buckets(self, max_num_seqs: int) -> Buckets:
        return self._executor.buckets(max_num_seqs)

    def watch(self, scheduler: Scheduler) -> None:
        """From now on hold each step against what this scheduler's requests own."""
        self._scheduler = scheduler

    def allocate(self, num_blocks: int, block_size: int, largest_step: StepSizes) -> None:
        self._block_size = block_size
        self._dead_lane = largest_step.num_lanes
        self._executor.allocate(num_blocks, block_size, largest_step)

    def submit(self, step_input: StepInput) -> QueuedStep:
        self.pass_time()
        check = self._ownership(step_input) if self._scheduler is not None else lambda: None
        self._queue.append(step := QueuedStep(self, step_input, check))
        self.num_ahead += self._num_untaken > 0
        self._num_untaken += 1
        assert self._num_untaken <= self.max_in_flight, "more steps than may be in flight"
        self.pass_time()
        return step

    def pass_time(self) -> None:
        """Let any number of the submitted steps run."""
        for _ in range(self._rng.randint(0, len(self._queue))):
            self._queue.popleft().run(self._executor)

    def run_until(self, step: QueuedStep) -> None:
        self._num_untaken -= 1
        while step in self._queue:
            self._queue.popleft().run(self._executor)
        self.pass_time()

    def stats(self) -> ExecutorStats:
        return self._executor.stats()

    def close(self) -> None:
        while self._queue:
            self._queue.popleft().run(self._executor)
        self._executor.close()

    def _ownership(self, step_input: StepInput) -> Callable[[], None]:
        """What the step touches, and a function that asserts that it is still owned by the same requests."""
        assert self._scheduler is not None
        kv = self._scheduler.kv
        items = list(self._scheduler.in_flight[-1])
        owned: list[tuple[Request, int | None, list[tuple[int, int, list[int]]]]] = []
        row = 0
        for index, item in enumerate(items):
            begin, end = step_input.query_start_loc[index : index + 2]
            lanes = set(step_input.token_lanes[begin:end][step_input.input_ids[begin:end] == CARRIED].tolist())
            assert lanes <= {item.request.lane}, "a token is carried from another request's lane"
            assert all(self._lane_samplers.get(lane) is item.request for lane in lanes), "the lane's token is another's"
            if item.samples:
                assert step_input.row_lanes[row] == item.request.lane, "the sample goes to another request's lane"
                self._lane_samplers[int(step_input.row_lanes[row])] = item.request
                row += 1
            places = []
            for number, group in enumerate(self.cache_groups):
                first = first_visible_token(group, item.start) // self._block_size
                last = -(-item.end // self._block_size)
                table = step_input.block_tables[number][index]
                written = {int(slot) // self._block_size for slot in step_input.slot_mappings[number][begin:end]}
                assert written <= set(table[first:last].tolist()), "a token is written outside its request's blocks"
                places.append((number, first, table[first:last].tolist()))
            owned.append((item.request, item.request.lane, places))
        assert (step_input.row_lanes[row:] == self._dead_lane).all(), "a row that samples nothing writes to a lane"

        def check() -> None:
            for request, lane, places in owned:
                assert request.lane == lane, "a lane was given back while a step still writes to it"
                for number, first, blocks in places:
                    now = request.block_tables[number][first : first + len(blocks)].tolist()
                    assert now == blocks, "blocks were given back while a step still reads or writes them"
            kv.check({id(request): request for request in self._holders()}.values())

        return check

    def _holders(self) -> Iterator[Request]:
        assert self._scheduler is not None
        yield from self._scheduler.running
        for step in self._scheduler.in_flight:
            yield from (item.request for item in step)


@contextmanager
def one_step_behind(seed: int = 0) -> Iterator[list[FakeStream]]:
    """Engines made inside run on streams of their own; the list holds these in the order of their making."""
    streams: list[FakeStream] = []

    def make(runner: model_executor.Runner) -> FakeStream:
        streams.append(FakeStream(ModelExecutor(runner), random.Random(seed)))
        return streams[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_executor, "ModelExecutor", make)
        yield streams
