"""The seam between the engine core and whatever computes a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from graphserve.plan.schema import CacheGroup
from graphserve.runtime.step_input import StepInput, StepOutput


class StepSizes(msgspec.Struct, frozen=True):
    """Tokens, logits rows and sequences of a step, padding included; and lanes, the dead one not included."""

    num_tokens: int
    num_rows: int
    num_seqs: int
    num_lanes: int


class Executor(Protocol):
    """Computes steps. One implementation drives one device; others may drive several.

    Attributes:
        vocab_size: number of logits a row.
        cache_groups: the plan's groups, in the order of ``StepInput.block_tables``.
        kv_bytes_per_token: KV cache bytes of one token place of a block, over all pool tensors.
    """

    vocab_size: int
    cache_groups: Sequence[CacheGroup]
    kv_bytes_per_token: int

    def allocate(self, num_blocks: int, block_size: int, largest_step: StepSizes) -> None:
        """Make the KV pool and room for the largest step; called once, before the first step."""

    def execute(self, step_input: StepInput) -> StepOutput:
        """Run the model on one step and sample. An exception ends the engine: the KV cache may be half written."""

    def close(self) -> None:
        """Give weights, KV pool and buffers back. The executor cannot be used afterwards."""
