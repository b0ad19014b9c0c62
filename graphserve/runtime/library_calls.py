"""Launches that are one library call writing into the plan's buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphserve.plan.runner import Action, PlanRunner, StepSize
from graphserve.plan.schema import Launch
from graphserve.runtime.launch_specs import value_name


def bind_product(launch: Launch, tensors: Mapping[str, Any]) -> Action | None:
    """``gs.linear`` as one ``torch.mm`` or ``torch.addmm``; None when the rows of x cannot be viewed as a matrix."""
    x, weight = (tensors[value_name(a)] for a in launch.args[:2])
    bias = tensors[value_name(launch.args[2])] if value_name(launch.args[2]) else None
    (name,) = launch.outputs
    assert name is not None
    output = tensors[name]
    rows = x.reshape(-1, x.shape[-1])
    if rows.data_ptr() != x.data_ptr():  # a copy, which would keep the values of the step it was bound in
        return None
    result, transposed = output.view(-1, output.shape[-1]), weight.t()
    if bias is None:
        return lambda: torch.mm(rows, transposed, out=result)
    return lambda: torch.addmm(bias, rows, transposed, out=result)


class LibraryBackend:
    """Binds ``library`` launches where no device backend does."""

    def bind(
        self, launch: Launch, runner: PlanRunner, tensors: Mapping[str, torch.Tensor], size: StepSize
    ) -> Action | None:
        return bind_product(launch, tensors)

    def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
        return actions
