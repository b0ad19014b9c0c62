"""The executor of one device: model runner and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from graphserve.engine.executor import StepSizes
from graphserve.engine.kv_pool_size import kv_bytes_per_token
from graphserve.plan.schema import CacheGroup, Plan
from graphserve.runtime.sampler import Sampler
from graphserve.runtime.step_input import StepInput, StepOutput


class Runner(Protocol):
    """What is needed of a model runner: logits of a step."""

    @property
    def plan(self) -> Plan: ...

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> None: ...

    def reserve(self, max_tokens: int, max_rows: int, max_seqs: int) -> None: ...

    def forward(self, step: StepInput) -> torch.Tensor:
        """Logits [R, vocab]; the buffer is the caller's until the next call."""

    def close(self) -> None: ...


class ModelExecutor:
    """Runs the model, then the sampler. See :class:`~graphserve.engine.executor.Executor`."""

    def __init__(self, runner: Runner) -> None:
        self._runner: Runner | None = runner
        self._sampler = Sampler()
        self.vocab_size = int(runner.plan.model["vocab_size"])
        self.cache_groups: Sequence[CacheGroup] = tuple(runner.plan.cache_groups)
        self.kv_bytes_per_token = kv_bytes_per_token(runner.plan)

    def allocate(self, num_blocks: int, block_size: int, largest_step: StepSizes) -> None:
        assert self._runner is not None, "the executor is closed"
        self._runner.allocate_kv_cache(num_blocks, block_size)
        self._runner.reserve(largest_step.num_tokens, largest_step.num_rows, largest_step.num_seqs)

    def execute(self, step_input: StepInput) -> StepOutput:
        assert self._runner is not None, "the executor is closed"
        with torch.inference_mode():
            return self._sampler(self._runner.forward(step_input), step_input.sampling)

    def close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()
