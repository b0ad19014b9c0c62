"""Measured choices of an 8B Llama shape: what ``warmup --measure`` finds on the device, and what it gains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from benchmarks.gpu_model import BLOCK_SIZE, GpuModel
from graphserve.engine.device_executor import DeviceExecutor
from graphserve.engine.measure_choices import CONTEXT, best_choice, decode_step, moves, step_seconds
from graphserve.runtime.choices import MeasuredChoices

NUM_SEQS = (1, 2, 4, 8, 16, 32, 64)


def measure_choices(model: GpuModel, seconds_left: Callable[[], float], reserve_s: float = 20) -> list[dict[str, Any]]:
    """For each number of sequences the choice, and milliseconds a step with it and by default."""
    executor = DeviceExecutor(model.runner)
    rows: list[dict[str, Any]] = []
    for num_seqs in NUM_SEQS:
        row: dict[str, Any] = {"sequences": num_seqs, "context": CONTEXT}
        rows.append(row)
        if seconds_left() < reserve_s:
            row["skipped"] = "no time left"
            continue
        begin = time.monotonic()
        step = decode_step(num_seqs, CONTEXT, model.num_blocks, BLOCK_SIZE, len(model.plan.cache_groups))
        choice = best_choice(executor, step, list(moves(model.plan, torch.device("cuda"), num_seqs)))
        row["choice"] = msgspec.to_builtins(choice)
        row["measured_in_s"] = round(time.monotonic() - begin, 1)
        for name, choices in (("default_ms", MeasuredChoices()), ("chosen_ms", MeasuredChoices({num_seqs: choice}))):
            executor.use_choices(choices)
            row[name] = round(step_seconds(executor, step, time.perf_counter) * 1e3, 3)
    executor.use_choices(MeasuredChoices())
    return rows
