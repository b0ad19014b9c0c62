"""Measured choices: how decode steps run fastest on one device, as ``graphserve warmup --measure`` found it.

Nothing depends on a table being there: without one, or for steps that it does not know, the defaults in the sources
hold. No choice changes what is computed, though it may change the order in which a sum is added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
import torch

from graphserve.artifacts import Artifact, ArtifactStore
from graphserve.config import EngineConfig
from graphserve.kernels.cpu.isa import isa_level
from graphserve.plan.runner import StepSize
from graphserve.plan.schema import Dim
from graphserve.plan.store import hash_sources
from graphserve.processors import processor_name, usable_threads

KIND, FILE = "choices", "choices.json"
NUM_SEQS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of the steps that are timed


class StepChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    """How decode steps of one size run. None leaves the default.

    Attributes:
        num_threads: threads of the generated C++ (CPU); by default ``usable_threads()``.
        segments: programs that share the keys of one query in attention (GPU).
        vector_products: products that a vector kernel computes, not the library, by :func:`product_name` (GPU).
    """

    num_threads: int | None = None
    segments: int | None = None
    vector_products: tuple[str, ...] | None = None


DEFAULT = StepChoice()


class MeasuredChoices(msgspec.Struct, frozen=True):
    """Choices by number of sequences of a decode step.

    Attributes:
        decode: for each measured number its choice; a number that was not measured takes that of the largest one below
            it, unless it is twice that or more.
    """

    decode: dict[int, StepChoice] = {}

    def of(self, size: StepSize) -> StepChoice:
        """The choice for a step; the default for one that is no decode step."""
        if size.num_tokens != size.num_seqs:
            return DEFAULT
        measured = max((n for n in self.decode if n <= size.num_seqs < 2 * n), default=None)
        return DEFAULT if measured is None else self.decode[measured]

    def covers(self, max_num_seqs: int) -> bool:
        """Whether the largest steps of an engine were measured, or all that ever are."""
        return 2 * max(self.decode, default=0) > min(max_num_seqs, NUM_SEQS[-1])


def product_name(weight_shape: tuple[Dim, ...]) -> str:
    """What a table calls the product with a weight of shape [N, K]."""
    return "x".join(map(str, weight_shape))


def choice_factors(plan_factors: Mapping[str, Any], config: EngineConfig, device: torch.device) -> dict[str, Any]:
    """Everything that a table depends on: the plan, how its steps are run, the kernels that were timed, the device."""
    return {
        **plan_factors,
        "block_size": config.block_size,
        "enforce_eager": config.enforce_eager,
        "kernel sources": kernel_source_hash(),
        "device": _device_name(device),
    }


def load_choices(store: ArtifactStore, factors: Mapping[str, Any]) -> MeasuredChoices | None:
    """The stored table for ``factors``, or None."""
    artifact = store.find(KIND, factors)
    return None if artifact is None else msgspec.json.decode(artifact.read(FILE), type=MeasuredChoices)


def save_choices(
    store: ArtifactStore, factors: Mapping[str, Any], choices: MeasuredChoices, built: Mapping[str, Any]
) -> Artifact:
    """Store a table.

    Args:
        built: facts about the measuring, for people.

    Raises:
        OSError: it cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(choices), indent=1)
    return store.put(KIND, factors, {FILE: data}, f"measured choices for {factors['device']}", built)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {isa_level()}, {usable_threads()} threads"


@cache
def kernel_source_hash() -> str:
    """Over all sources of kernels and runtime: another kernel was not measured."""
    return hash_sources("kernels/**/*", "runtime/**/*")
