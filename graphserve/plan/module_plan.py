"""The plan of a user's own module, and how the module's arguments and results map to it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from graphserve.plan.schema import Plan
from graphserve.plan.symbols import Affine

Size = int | Affine


class Output(msgspec.Struct, frozen=True):
    """One result of the module: a tensor's shape and strides (the eager ones), or a number."""

    shape: tuple[Size, ...] = ()
    stride: tuple[Size, ...] = ()
    dtype: torch.dtype | None = None
    number: Size | None = None


@dataclass(frozen=True)
class ModulePlan:
    """A plan and how the module's flat arguments and results map to it.

    Attributes:
        plan: its ``inputs`` are those placeholders that are used, and the constants.
        arguments: value name of each flat argument of the module, None for one that no launch reads.
        constants: value name → tensor that the module's Python made.
        outputs: every result in order; ``plan.outputs`` are those of them that are tensors.
        size_argument: position of the argument and dimension that the plan's symbol T is read from; None when all
            sizes are fixed.
    """

    plan: Plan
    arguments: list[str | None]
    constants: dict[str, torch.Tensor]
    outputs: list[Output | None]
    size_argument: tuple[int, int] | None
