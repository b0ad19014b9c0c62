"""Compiles tiny and published configs for the compiler's tests, and compares plans by meaning."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from transformers import PretrainedConfig

from graphserve.compiler.build import BuildResult, build_plan
from graphserve.compiler.capture import register_interfaces
from graphserve.models.meta_model import build_meta_model, non_persistent_buffers
from graphserve.models.rope import bake_rope
from graphserve.plan.schema import Launch, Plan
from tests.tiny_models import tiny_config

MAX_MODEL_LEN = 128


def compiled(
    config: PretrainedConfig, max_model_len: int = MAX_MODEL_LEN, dtype: torch.dtype = torch.float32, **options: Any
) -> BuildResult:
    register_interfaces()
    model = build_meta_model(config, dtype)
    bake_rope(model, max_model_len)
    return build_plan(model, max_model_len, non_persistent_buffers(model), **options)


def compiled_tiny(name: str, **options: Any) -> BuildResult:
    return compiled(tiny_config(name), **options)


def comparable(plan: Plan) -> dict[str, Any]:
    """What a plan computes, whatever its buffers are called: they are numbered in the order they are written."""
    numbers: dict[str, str] = {}
    launches = [_renamed(launch, numbers, plan.weights) for launch in (*plan.init, *plan.launches)]
    return {
        "launches": launches,
        "buffers": {numbers[name]: spec for name, spec in plan.buffers.items()},
        "weights": plan.weights,
        "cache": (plan.cache_layers, plan.cache_groups),
        "model": plan.model,
        "output": numbers[plan.outputs[0]],
    }


def _renamed(launch: Launch, numbers: dict[str, str], fixed: Container[str]) -> tuple[Any, ...]:
    def look_up(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: numbers.get(v, v) if key == "v" else v for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return tuple(look_up(v) for v in value)
        return value

    args, kwargs = look_up(launch.args), {key: look_up(value) for key, value in launch.kwargs.items()}
    for name in launch.outputs:
        if name is not None and name not in fixed:
            numbers[name] = f"#{len(numbers)}"
    outputs = tuple(numbers.get(name, name) if name is not None else None for name in launch.outputs)
    return launch.op, args, kwargs, outputs, launch.kind, launch.layer, launch.kernel
