"""The executor of one device: model runner and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import torch

from graphserve.engine.executor import ExecutorStats, StepSizes
from graphserve.plan.schema import CacheGroup, Plan
from graphserve.runtime.buckets import Buckets
from graphserve.runtime.choices import MeasuredChoices
from graphserve.runtime.kv_pool_size import kv_bytes_per_token
from graphserve.runtime.sampler import Sampler
from graphserve.runtime.step_input import CARRIED, INVALID_TOKEN, StepInput, StepOutput


class Runner(Protocol):
    """What is needed of a model runner: logits of a step."""

    @property
    def plan(self) -> Plan: ...

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> None: ...

    def reserve(self, max_tokens: int, max_rows: int, max_seqs: int) -> None: ...

    def forward(self, step: StepInput) -> torch.Tensor:
        """Logits [R, vocab]; the buffer is the caller's until the next call."""

    def use_choices(self, choices: MeasuredChoices) -> None: ...

    def sleep(self, level: int) -> None: ...

    def wake_up(self) -> None: ...

    def close(self) -> None: ...


class FinishedStep:
    """The handle of a step that has run already."""

    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def result(self) -> StepOutput:
        return self._output


class ModelExecutor:
    """Runs the model, then the sampler. See :class:`~graphserve.engine.executor.Executor`.

    A step has run when :meth:`submit` returns, so there is nothing to gain from submitting ahead. Ids that are carried
    are looked up in the lanes' last tokens on the host.
    """

    max_in_flight = 1

    def __init__(self, runner: Runner) -> None:
        self._runner: Runner | None = runner
        self._sampler = Sampler()
        self._last_tokens = np.zeros(1, np.int64)  # of each lane, the dead one at the end
        self.vocab_size = int(runner.plan.model["vocab_size"])
        self.cache_groups: Sequence[CacheGroup] = tuple(runner.plan.cache_groups)
        self.kv_bytes_per_token = kv_bytes_per_token(runner.plan)

    def buckets(self, max_num_seqs: int) -> Buckets:
        return Buckets(max_num_seqs)

    def allocate(self, num_blocks: int, block_size: int, largest_step: StepSizes) -> None:
        assert self._runner is not None, "the executor is closed"
        self._runner.allocate_kv_cache(num_blocks, block_size)
        self._runner.reserve(largest_step.num_tokens, largest_step.num_rows, largest_step.num_seqs)
        self._last_tokens = np.zeros(largest_step.num_lanes + 1, np.int64)

    def submit(self, step_input: StepInput) -> FinishedStep:
        assert self._runner is not None, "the executor is closed"
        is_carried = step_input.input_ids == CARRIED
        if is_carried.any():
            input_ids = np.where(is_carried, self._last_tokens[step_input.token_lanes], step_input.input_ids)
            step_input = msgspec.structs.replace(step_input, input_ids=input_ids)
        with torch.inference_mode():
            output = self._sampler(self._runner.forward(step_input), step_input.sampling)
        lanes = step_input.row_lanes[: len(output.token_ids)]
        self._last_tokens[lanes] = [0 if token_id == INVALID_TOKEN else token_id for token_id in output.token_ids]
        return FinishedStep(output)

    def use_choices(self, choices: MeasuredChoices) -> None:
        assert self._runner is not None, "the executor is closed"
        self._runner.use_choices(choices)

    def stats(self) -> ExecutorStats:
        return ExecutorStats()

    def sleep(self, level: int) -> None:
        assert self._runner is not None, "the executor is closed"
        self._runner.sleep(level)

    def wake_up(self) -> None:
        assert self._runner is not None, "the executor is closed"
        self._runner.wake_up()

    def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
