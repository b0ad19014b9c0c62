"""The seam between the engine core and whatever computes a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from graphserve.plan.schema import CacheGroup
from graphserve.runtime.buckets import Buckets
from graphserve.runtime.step_input import StepInput, StepOutput

if TYPE_CHECKING:
    from graphserve.runtime.choices import MeasuredChoices


class StepSizes(msgspec.Struct, frozen=True):
    """Tokens, logits rows and sequences of a step, padding included; and lanes, the dead one not included."""

    num_tokens: int
    num_rows: int
    num_seqs: int
    num_lanes: int


class ExecutorStats(msgspec.Struct, frozen=True):
    """What an executor has done so far, and what its captures take.

    Attributes:
        num_variant_steps: steps by variant of the captured step; empty if there are no variants.
        num_eager_steps: those of them that were launched one launch after the other, not replayed.
        num_graphs: recordings of steps; graph_bytes: device memory that they took.
    """

    num_variant_steps: dict[str, int] = {}
    num_eager_steps: int = 0
    num_graphs: int = 0
    graph_bytes: int = 0


class StepHandle(Protocol):
    """A step that was submitted."""

    def result(self) -> StepOutput:
        """Wait for the step's end. Called once, in the order of submission."""


class Executor(Protocol):
    """Computes steps. One implementation drives one device; others may drive several.

    Attributes:
        vocab_size: number of logits a row.
        cache_groups: the plan's groups, in the order of ``StepInput.block_tables``.
        kv_bytes_per_token: KV cache bytes of one token place of a block, over all pool tensors.
        max_in_flight: how many steps may be submitted before the result of the first is taken; 1 is synchronous.
    """

    vocab_size: int
    cache_groups: Sequence[CacheGroup]
    kv_bytes_per_token: int
    max_in_flight: int

    def buckets(self, max_num_seqs: int) -> Buckets:
        """The sizes that steps of up to ``max_num_seqs`` sequences are padded to."""

    def allocate(self, num_blocks: int, block_size: int, largest_step: StepSizes) -> None:
        """Make the KV pool and room for the largest step; called once, before the first step."""

    def submit(self, step_input: StepInput) -> StepHandle:
        """Begin to run the model on one step and to sample. Steps run one after the other, in this order.

        An exception, here or from the handle, ends the engine: the KV cache may be half written.
        """

    def use_choices(self, choices: MeasuredChoices) -> None:
        """Run decode steps so from now on; no step may be on its way."""

    def stats(self) -> ExecutorStats:
        """The numbers of now; those of the end once it is closed."""

    def sleep(self, level: int) -> None:
        """Give the memory of KV pool and weights back; no step may be on its way.

        Args:
            level: 1 keeps a copy of the weights in the host's memory, 2 reads them again when the executor wakes up.

        Raises:
            ConfigError: level 2, and the weights cannot be read again; nothing was given back.
        """

    def wake_up(self) -> None:
        """Take the memory again; the KV pool is empty. The executor sleeps on if this raises."""

    def close(self) -> None:
        """Wait for submitted steps, whose results are lost, and give weights, KV pool and buffers back.

        The executor cannot be used afterwards. A step that fails, or has failed, raises nothing here.
        """
