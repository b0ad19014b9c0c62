"""The kernels of one captured decode step in the order of time, as CUPTI saw them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_model import GpuModel, decode_step, first_tokens, run_steps
from benchmarks.timeline import describe, spans_of

CONTEXT = 1024
NUM_STEPS = 5


def measure_timeline(model: GpuModel, batches: tuple[int, ...] = (1, 64)) -> list[dict[str, Any]]:
    """For each batch one step's spans, the time in it without any, and the time between two steps."""
    rows = []
    for batch in batches:
        step = decode_step(batch, CONTEXT, model.num_blocks)
        model.runner.submit(first_tokens(step)).result()
        model.runner.submit(step).result()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run_steps(model, step, NUM_STEPS)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            rows.append({"batch": batch, "context": CONTEXT, **describe(spans_of(json.loads(path.read_text())))})
    return rows
