"""The step loop: schedule, build the step input, submit, retire."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from graphserve.engine.block_pool import BlockPool
from graphserve.engine.executor import Executor, StepHandle
from graphserve.engine.kv_cache_manager import KVCacheManager
from graphserve.engine.request import EngineCoreOutput, EngineCoreRequest, Request, RequestStatus
from graphserve.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from graphserve.engine.step_builder import StepBuilder
from graphserve.errors import RequestError
from graphserve.runtime.buckets import Buckets
from graphserve.runtime.step_input import INVALID_TOKEN, StepOutput

logger = logging.getLogger(__name__)


class EngineCoreStats(msgspec.Struct):
    """A snapshot. ``*_total`` only grow; ``last_step_s`` is in seconds.

    ``num_sync_steps_total`` counts the steps that waited for the end of the one before, because a row's sampling reads
    its tokens or because blocks lacked; ``num_variant_steps_total`` the steps by variant of the captured step;
    ``num_eager_steps_total`` those of them that no captured graph fitted. ``num_graphs`` graphs are captured and take
    ``graph_bytes`` of the device's memory.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_in_use: int = 0
    num_preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    num_steps_total: int = 0
    num_sync_steps_total: int = 0
    num_variant_steps_total: dict[str, int] = {}
    num_eager_steps_total: int = 0
    num_graphs: int = 0
    graph_bytes: int = 0
    num_padding_tokens_total: int = 0
    last_step_s: float = 0.0

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV blocks in use, 0..1."""
        return self.num_blocks_in_use / max(1, self.num_blocks - 1)


class EngineCore:
    """Runs requests to their end, many at a time, one step a call.

    Invariant: after every :meth:`step` each known request is queued, running or gone, and one that is gone holds no
    block that no step in flight writes to; when no request is left, no step is in flight. The failure of one request
    ends that request only; an exception of the executor goes through to the caller, after which only :meth:`close` may
    be called.

    Args:
        executor: computes steps; its KV cache is made here.
        limits: bounds of a step.
        num_blocks: size of the KV pool, null block included.
        block_size: tokens a block.
        pad_steps: whether steps are padded to bucket sizes.
        clock: seconds of a monotonic clock, for the statistics.
    """

    def __init__(
        self,
        executor: Executor,
        limits: SchedulerLimits,
        num_blocks: int,
        block_size: int,
        pad_steps: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._clock = clock
        self._pool = BlockPool(num_blocks)
        self._kv = KVCacheManager(executor.cache_groups, self._pool, block_size)
        self.scheduler = Scheduler(limits, self._kv)
        no_buckets = Buckets(limits.max_num_seqs, is_enabled=False)
        self._builder = StepBuilder(
            len(executor.cache_groups),
            block_size,
            executor.buckets(limits.max_num_seqs) if pad_steps else no_buckets,
            num_lanes=limits.max_num_seqs,
            runs_ahead=executor.max_in_flight > 1,
        )
        self._handles: deque[StepHandle] = deque()  # of the scheduler's steps in flight
        self._requests: dict[str, Request] = {}
        self._num_arrivals = 0
        self._stats = EngineCoreStats(num_blocks=num_blocks)
        executor.allocate(num_blocks, block_size, self._builder.largest_step(limits))

    def add_request(self, core_request: EngineCoreRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: its id is in use, or its prompt can never fit into the KV pool.
        """
        if core_request.request_id in self._requests:
            raise RequestError(f"request id {core_request.request_id!r} is in use: choose another", "request_id")
        num_tokens = len(core_request.prompt_token_ids)
        needed = self._kv.num_blocks_for(num_tokens + 1, 1)
        if needed > self._pool.num_usable:
            raise RequestError(
                f"a prompt of {num_tokens} tokens needs {needed} KV blocks of {self._kv.block_size} tokens, the pool "
                f"has {self._pool.num_usable}: shorten it or raise kv_cache_memory_bytes (or num_gpu_blocks_override)",
                "prompt",
            )
        request = Request(core_request, self._num_arrivals)
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without further output; ids that are unknown or ended are ignored.

        If none is left, this waits for the steps in flight.
        """
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self.scheduler.finish(request)
        self._settle()

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[EngineCoreOutput]:
        """Submit one step, and retire the oldest once as many are in flight as may be.

        Returns:
            Outputs of the requests that got a token, prompt log-probabilities, or an end.
        """
        begin = self._clock()
        schedule = self.scheduler.schedule()
        outputs = [self._exhausted(request) for request in schedule.exhausted]
        self._stats.num_sync_steps_total += schedule.must_wait
        if schedule.scheduled:
            step_input = self._builder.build(schedule.scheduled)
            self._handles.append(self._executor.submit(step_input))
            self._stats.num_steps_total += 1
            self._stats.num_padding_tokens_total += len(step_input.input_ids) - step_input.num_tokens
        if self._handles and (not schedule.scheduled or len(self._handles) >= self._executor.max_in_flight):
            outputs.extend(self._retire_step())
        self._settle()
        self._stats.last_step_s = self._clock() - begin
        return outputs

    def stats(self) -> EngineCoreStats:
        """The numbers of now."""
        executor = self._executor.stats()
        return msgspec.structs.replace(
            self._stats,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_blocks_in_use=self._pool.num_in_use,
            num_preemptions_total=self.scheduler.num_preemptions,
            num_variant_steps_total=executor.num_variant_steps,
            num_eager_steps_total=executor.num_eager_steps,
            num_graphs=executor.num_graphs,
            graph_bytes=executor.graph_bytes,
        )

    def sleep(self, level: int) -> None:
        """Give the executor's memory back until :meth:`wake_up`; there must be no request."""
        assert not self._requests and not self._handles, "a request is running"
        self._executor.sleep(level)

    def wake_up(self) -> None:
        """Take the memory again."""
        self._executor.wake_up()

    def close(self) -> None:
        """End all requests and give the executor's memory back. Also right after an exception of the executor."""
        for request in self._requests.values():
            self.scheduler.finish(request)
        self._requests.clear()
        self._executor.close()
        self._handles.clear()
        while self.scheduler.in_flight:
            self.scheduler.retire()

    def _settle(self) -> None:
        """If no request is left, wait for the steps in flight: all of their rows ended late, and hold blocks."""
        while self._handles and not self._requests:
            self._retire_step()

    def _retire_step(self) -> list[EngineCoreOutput]:
        """Wait for the oldest step and take it in. Rows of sampled tokens are in the order of the parts that sample."""
        step_output = self._handles.popleft().result()
        outputs = []
        row = 0
        for index, item in enumerate(self.scheduler.retire()):
            sampled_row = None
            if item.samples:
                sampled_row = row
                row += 1
            if item.request.status is RequestStatus.FINISHED:
                continue  # it ended after this step had been submitted: nobody may see what came of it
            try:
                output = self._retire(item, index, sampled_row, step_output)
            except Exception as error:  # one request's fault must not end the others
                logger.exception("request %s failed", item.request.request_id)
                output = self._failed(item.request, f"{type(error).__name__}: {error}")
            if output is not None:
                outputs.append(output)
        return outputs

    def _retire(
        self, item: ScheduledRequest, index: int, sampled_row: int | None, step_output: StepOutput
    ) -> EngineCoreOutput | None:
        request = item.request
        if item.start < request.num_prompt_tokens and not request.num_output_tokens:
            self._stats.prompt_tokens_total += item.num_tokens
        prompt_logprobs = step_output.prompt_logprobs.get(index)
        if prompt_logprobs is not None:
            request.num_known_prompt_logprobs += len(prompt_logprobs)
        if sampled_row is None:
            if prompt_logprobs is None:
                return None
            return EngineCoreOutput(request.request_id, [], prompt_logprobs=prompt_logprobs)

        token_id = step_output.token_ids[sampled_row]
        if token_id == INVALID_TOKEN:
            return self._failed(
                request,
                f"no token can be sampled after {request.num_output_tokens} output tokens: the model's logits hold "
                "NaN, or logit_bias, allowed_token_ids, bad_words and min_tokens together suppress every token",
            )
        request.token_ids.append(token_id)
        self._stats.generation_tokens_total += 1
        output = EngineCoreOutput(
            request.request_id, [token_id], prompt_logprobs=prompt_logprobs, num_preemptions=request.num_preemptions
        )
        logprobs = step_output.logprobs[sampled_row] if step_output.logprobs is not None else None
        if logprobs is not None:
            output.logprobs = [logprobs]
        cause = request.stop_cause(token_id)
        if cause is not None:
            output.finish_reason, output.stop_reason = cause
            self._end(request)
        return output

    def _exhausted(self, request: Request) -> EngineCoreOutput:
        return self._failed(
            request,
            f"the request has {request.num_tokens} tokens and needs more KV blocks than the pool's "
            f"{self._pool.num_usable} of {self._kv.block_size} tokens: shorten it, lower max_tokens, or raise "
            "kv_cache_memory_bytes (or num_gpu_blocks_override)",
        )

    def _failed(self, request: Request, message: str) -> EngineCoreOutput:
        self._end(request)
        return EngineCoreOutput(request.request_id, [], finish_reason="error", error=message)

    def _end(self, request: Request) -> None:
        del self._requests[request.request_id]
        self.scheduler.finish(request)
