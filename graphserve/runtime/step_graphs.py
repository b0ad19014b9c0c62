"""What recorded steps have in common, whether a GPU replays them or the recorder that stands in for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from graphserve.plan.runner import Action, StepSize
from graphserve.plan.schema import Launch
from graphserve.runtime.step_plan import Variant


class GraphKey(NamedTuple):
    """What a recorded sequence of launches depends on; lengths are no part of it."""

    variant: Variant
    part: int  # 0, and 1 for what a split step does after the host's turn
    size: StepSize


class Recording(NamedTuple):
    """What is to be recorded.

    Attributes:
        launches: each launch and its action.
        tensors: all values that the launches were bound to, by name.
        current: gives the inputs, weights and state as they are when it is called, by name.
    """

    launches: Sequence[tuple[Launch, Action]]
    tensors: Mapping[str, torch.Tensor]
    current: Callable[[], Mapping[str, torch.Tensor]]


class StepGraphs(Protocol):
    """Recorded steps by key. Inputs of a recording must hold a step without effect: dead lanes, null slots.

    Attributes:
        num_bytes: device memory that recordings took.
    """

    num_bytes: int

    def __len__(self) -> int: ...

    def __contains__(self, key: GraphKey) -> bool: ...

    def record(self, key: GraphKey, recording: Recording) -> bool:
        """Keep a sequence of launches; False if there is no memory for it, and none will be recorded at its size."""

    def replay(self, key: GraphKey) -> None:
        """Do the launches again, with what the inputs hold now."""

    def close(self) -> None:
        """Forget all recordings."""
