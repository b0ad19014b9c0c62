"""Model parameters → the plan's weights, streaming: each parameter is copied to where it belongs and forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch

from graphserve.errors import CheckpointError
from graphserve.plan.arena import launch_inputs
from graphserve.plan.runner import run_once, torch_dtype
from graphserve.plan.schema import Plan, WeightPart, WeightSpec
from graphserve.progress import phase
from graphserve.runtime.pinned_copies import PinnedCopies


def materialize_weights(
    plan: Plan,
    parameters: Iterable[tuple[str, torch.Tensor]],
    constants: dict[str, torch.Tensor],
    device: torch.device,
    into: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Build all weights of ``plan``, position tables included.

    Args:
        parameters: (name as `transformers` has it, tensor) in any order; consumed once. Merged weights are allocated
            once and filled in place, so no parameter is held twice.
        constants: values of the plan's ``constant`` weights.
        into: tensors on ``device`` that the weights of these names are written into.

    Raises:
        CheckpointError: a parameter that the plan needs never came, or has another shape than the plan says.
    """
    weights: dict[str, torch.Tensor] = {}
    places: dict[str, list[tuple[str, WeightPart, int]]] = defaultdict(list)  # parameter → (weight, part, start)
    for name, weight in plan.weights.items():
        if weight.source == "constant":
            weights[name] = _kept(name, constants[name].to(device, torch_dtype(weight.spec.dtype)), into)
        start = 0
        for part in weight.parts:
            places[part.parameter].append((name, part, start))
            start += part.size
    missing = set(places)
    with PinnedCopies(device) if device.type == "cuda" else nullcontext() as copies:
        for name, tensor in parameters:
            missing.discard(name)
            if copies is not None and name in places and tensor.device.type == "cpu":
                tensor = copies.copy(tensor)
            for weight_name, part, start in places.get(name, ()):
                _place(weights, weight_name, plan.weights[weight_name], part, start, tensor, device, into)
    if missing:
        raise CheckpointError(f"parameters that never came: {', '.join(sorted(missing)[:10])} ({len(missing)} in all)")
    _run_init(plan, weights, device, into)
    # What init launches alone read (a matrix that was quantized, say) is freed.
    for name in _init_only(plan):
        weights.pop(name, None)
    return weights


def kept_weights(plan: Plan) -> dict[str, WeightSpec]:
    """The weights that stay on the device, without those that only the plan's init launches read."""
    dropped = _init_only(plan)
    return {name: weight for name, weight in plan.weights.items() if name not in dropped}


def _init_only(plan: Plan) -> set[str]:
    return {n for x in plan.init for n in launch_inputs(x)} - {n for x in plan.launches for n in launch_inputs(x)}


def _kept(name: str, value: torch.Tensor, into: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """The value in its place, or contiguous where it is."""
    if into is None or name not in into:
        return value.contiguous()
    return into[name].copy_(value)


def _place(
    weights: dict[str, torch.Tensor],
    name: str,
    weight: WeightSpec,
    part: WeightPart,
    start: int,
    parameter: torch.Tensor,
    device: torch.device,
    into: Mapping[str, torch.Tensor] | None,
) -> None:
    value = parameter.t() if part.is_transposed else parameter
    shape = [int(d) for d in weight.spec.shape]
    expected = list(shape)
    if expected:
        expected[weight.dim] = part.size
    if list(value.shape) != expected:
        raise CheckpointError(f"parameter {part.parameter} has shape {list(parameter.shape)}; as part of {name} "
                              f"{expected} is needed")  # fmt: skip
    dtype = torch_dtype(weight.spec.dtype)
    if len(weight.parts) == 1:
        weights[name] = _kept(name, value.to(device, dtype), into)
        return
    if name not in weights:
        place = into.get(name) if into is not None else None
        weights[name] = torch.empty(shape, dtype=dtype, device=device) if place is None else place
    weights[name].narrow(weight.dim, start, part.size).copy_(value)


def _run_init(
    plan: Plan, weights: dict[str, torch.Tensor], device: torch.device, into: Mapping[str, torch.Tensor] | None
) -> None:
    """Compute position tables: the plan's init launches, with all positions a request can have."""
    if not plan.init:
        return
    length = plan.model["max_model_len"]
    tensors = dict(weights)
    with phase("compute position tables"):
        tensors["positions"] = torch.arange(length, dtype=torch.int64, device=device)[None]
        run_once(plan.init, tensors, length, device)
        for name, weight in plan.weights.items():
            if weight.source == "init":
                weights[name] = _kept(name, tensors[name].reshape([int(d) for d in weight.spec.shape]), into)
