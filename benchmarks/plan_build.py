"""Time to build a plan at two depths: layers of one type are traced once, so depth should cost little.

    python -m benchmarks.plan_build [--depths 4,64] [--rounds 3]

Builds plans of the shape of Llama-3.1-8B (no weights) in rounds, the depths taking turns. Prints the median and spread
of each depth and phase; the last stdout line is one JSON document.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.coverage import machine
from graphserve.compiler.build import BuildResult, build_plan
from graphserve.compiler.capture import register_interfaces
from graphserve.models.meta_model import build_meta_model, non_persistent_buffers
from tests.compiler.published_configs import LLAMA_3_1_8B, published

RESULTS = Path(__file__).resolve().parent / "results" / "plan_build.json"
MAX_MODEL_LEN: int = LLAMA_3_1_8B["max_position_embeddings"]


def build(num_layers: int) -> tuple[BuildResult, float]:
    """A plan and the seconds that building it took, the meta model not counted."""
    model = build_meta_model(published(LLAMA_3_1_8B | {"num_hidden_layers": num_layers}), torch.bfloat16)
    buffers = non_persistent_buffers(model)
    start = time.perf_counter()
    built = build_plan(model, MAX_MODEL_LEN, buffers)
    seconds = time.perf_counter() - start
    assert sum(launch.op == "gs.paged_attention.default" for launch in built.plan.launches) == num_layers
    return built, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="4,64", help="numbers of layers, the shallowest first")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    depths = [int(depth) for depth in args.depths.split(",")]
    torch.set_num_threads(1)
    register_interfaces()
    build(depths[0])  # the first trace of a process also imports and initialises the tracer
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    phases: dict[int, list[dict[str, float]]] = {depth: [] for depth in depths}
    for _ in range(args.rounds):
        for depth in depths:
            built, taken = build(depth)
            seconds[depth].append(taken)
            phases[depth].append(built.seconds)
    rows = {str(depth): summary(seconds[depth], phases[depth]) for depth in depths}
    for depth, row in rows.items():
        spread = f"{row['min_s']:.2f} to {row['max_s']:.2f} s"
        shown = ", ".join(f"{name} {value:.2f}" for name, value in row["phases_s"].items())
        sys.stdout.write(f"{depth:>4} layers: {row['median_s']:.2f} s ({spread}); {shown}\n")
    document = {
        "environment": {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "machine": machine(),
            "command": f"python -m benchmarks.plan_build --depths {args.depths} --rounds {args.rounds}",
        },
        "depths": rows,
        "ratio": round(rows[str(depths[-1])]["median_s"] / rows[str(depths[0])]["median_s"], 3),
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


def summary(seconds: list[float], phases: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "median_s": round(statistics.median(seconds), 3),
        "min_s": round(min(seconds), 3),
        "max_s": round(max(seconds), 3),
        "phases_s": {name: round(statistics.median(p[name] for p in phases), 3) for name in phases[0]},
    }


if __name__ == "__main__":
    sys.exit(main())
