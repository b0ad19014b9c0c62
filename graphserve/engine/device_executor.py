"""The executor whose steps are recorded: the device samples, and the host runs a step behind."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from graphserve.engine.executor import ExecutorStats, StepSizes
from graphserve.errors import ConfigError
from graphserve.plan.runner import StepSize
from graphserve.plan.schema import CacheGroup
from graphserve.runtime.buckets import Buckets, CaptureBuckets
from graphserve.runtime.choices import MeasuredChoices
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.kv_pool_size import kv_bytes_per_token
from graphserve.runtime.step_input import StepInput
from graphserve.runtime.step_plan import Variant
from graphserve.runtime.submitted_step import SubmittedStep
from graphserve.runtime.weight_memory import WeightMemory

logger = logging.getLogger(__name__)


class DeviceExecutor:
    """Drives a :class:`DeviceRunner`. See :class:`~graphserve.engine.executor.Executor`.

    Args:
        decode_sizes: sequences of the decode steps that are captured, see :class:`CaptureBuckets`.
        record_ahead: variants of decode steps that are recorded before the first request comes; others, and steps with
            a prefill, when they are first needed.
        weights: those of the runner, where they can sleep.
    """

    def __init__(
        self,
        runner: DeviceRunner,
        decode_sizes: Sequence[int] | None = None,
        record_ahead: Sequence[Variant] = (),
        weights: WeightMemory | None = None,
    ) -> None:
        self._runner: DeviceRunner | None = runner
        self._decode_sizes = decode_sizes
        self._record_ahead = record_ahead
        self._weights = weights
        self.max_in_flight = runner.max_in_flight
        self._last_stats = ExecutorStats()
        self.vocab_size = int(runner.plan.model["vocab_size"])
        self.cache_groups: Sequence[CacheGroup] = tuple(runner.plan.cache_groups)
        self.kv_bytes_per_token = kv_bytes_per_token(runner.plan)

    def buckets(self, max_num_seqs: int) -> Buckets:
        return CaptureBuckets(max_num_seqs, self._decode_sizes)

    def allocate(self, num_blocks: int, block_size: int, largest_step: StepSizes) -> None:
        assert self._runner is not None, "the executor is closed"
        largest = StepSize((largest_step.num_tokens, largest_step.num_rows, largest_step.num_seqs))
        buckets = CaptureBuckets(largest_step.num_lanes, self._decode_sizes)
        self._runner.allocate(num_blocks, block_size, largest, largest_step.num_lanes, buckets)
        if self._record_ahead and self._runner.can_record:
            begin = time.perf_counter()
            self._runner.record((StepSize((n, n, n)) for n in buckets.decode_sizes), self._record_ahead)
            stats = self.stats()
            logger.info(
                "captured %d decode steps of up to %d sequences in %.1f s: %.2f GB",
                stats.num_graphs, max(buckets.decode_sizes, default=0), time.perf_counter() - begin,
                stats.graph_bytes / 1e9,
            )  # fmt: skip

    def submit(self, step_input: StepInput) -> SubmittedStep:
        assert self._runner is not None, "the executor is closed"
        return self._runner.submit(step_input)

    def use_choices(self, choices: MeasuredChoices) -> None:
        assert self._runner is not None, "the executor is closed"
        self._runner.use_choices(choices)

    def stats(self) -> ExecutorStats:
        runner = self._runner
        if runner is None:
            return self._last_stats
        return ExecutorStats(
            dict(runner.num_variant_steps), runner.num_eager_steps, runner.num_graphs, runner.graph_bytes
        )

    def sleep(self, level: int) -> None:
        assert self._runner is not None and self._runner.is_idle, "the executor is closed, or a step on its way"
        pool = self._runner.kv_cache
        if self._weights is None or pool is None or not pool.can_unmap:
            raise ConfigError("sleep needs a CUDA device: recorded steps hold the addresses of weights and KV pool")
        self._weights.sleep(level)
        pool.unmap()

    def wake_up(self) -> None:
        assert self._runner is not None and self._weights is not None, "the executor is closed"
        self._weights.wake_up()
        assert self._runner.kv_cache is not None
        self._runner.kv_cache.map()

    def close(self) -> None:
        self._last_stats = self.stats()
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
        if self._weights is not None:
            self._weights.close()
