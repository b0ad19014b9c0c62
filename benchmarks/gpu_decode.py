"""Decode steps of an 8B Llama shape with random weights: whole captured steps, as the engine runs them."""

from __future__ import annotations

import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_model import BLOCK_SIZE, GpuModel, decode_step, distinct_share, first_tokens, step_times_ms
from graphserve.runtime.triton_backend import target_of
from graphserve.runtime.triton_plan import lower_to_triton

STEPS = [(batch, context) for batch in (1, 16, 64, 256) for context in (1024, 4096)]
NUM_STEPS = 30


def measure_decode(model: GpuModel, seconds_left: Callable[[], float], reserve_s: float = 15) -> dict[str, Any]:
    """Milliseconds a step, by batch and context; also what building and loading took."""
    result: dict[str, Any] = {
        "model": f"Llama-3.1-8B shape, {len(model.plan.cache_layers)} layers, bf16, random weights",
        "what": "whole greedy steps from captured graphs: tokens in, layers, head, sampling, tokens out",
        "weight_bytes": model.weight_bytes,
        "kv_blocks": model.num_blocks,
        "seconds": model.seconds,
        "steps": [],
    }
    eager_before = model.runner.num_eager_steps
    for batch, context in STEPS:
        row: dict[str, Any] = {"batch": batch, "context": context}
        result["steps"].append(row)
        if seconds_left() < reserve_s:
            row["skipped"] = "no time left"
            continue
        try:
            row |= _time_step(model, batch, context)
        except Exception:  # noqa: BLE001 - the suite's isolation boundary, once a step: its row says what it raised
            row["error"] = traceback.format_exc()[-3000:]
    assert model.runner.kv_cache is not None
    lowered = lower_to_triton(model.plan, model.runner.kv_cache, target_of(torch.cuda.get_device_capability()))
    result["launch_kinds"] = dict(Counter(launch.kind for launch in lowered.plan.launches))
    result["refusals"] = sorted(set(lowered.refusals.values()))
    result["num_eager_steps"] = model.runner.num_eager_steps - eager_before
    return result


def _time_step(model: GpuModel, batch: int, context: int) -> dict[str, Any]:
    """Steps as an engine drives them: by events on the stream and by the host's clock."""
    step = decode_step(batch, context, model.num_blocks)
    model.runner.submit(first_tokens(step)).result()
    model.runner.submit(step).result()
    torch.cuda.synchronize()
    start = time.perf_counter()
    on_device = step_times_ms(model, step, NUM_STEPS)
    host_ms = (time.perf_counter() - start) * 1e3 / NUM_STEPS
    ms = statistics.median(on_device)
    num_bytes = model.weight_bytes + batch * context * model.bytes_per_block // BLOCK_SIZE
    return {
        "event_ms": round(ms, 3),
        "event_ms_min_max": [round(min(on_device), 3), round(max(on_device), 3)],
        "host_ms": round(host_ms, 3),
        "tokens_per_s": round(batch / host_ms * 1e3, 1),
        "gb_s": round(num_bytes / ms / 1e6, 1),
        "distinct_kv_share": round(distinct_share(batch, context, model.num_blocks), 3),
    }
