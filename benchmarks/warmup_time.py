"""Seconds that ``graphserve warmup`` takes for a GPU, from a config alone, and what a second model takes over.

    python -m benchmarks.warmup_time [--target cuda:90] [--jobs 2] [--out FILE]

Each model is warmed up into an empty store. Then a model of half its depth with layers of the same shapes is warmed up
into that store: ``reused`` is the share of its artifacts (plan and kernels) that were there. No GPU and no weights are
needed. The last stdout line is one JSON document; exit status 1 if a warm-up took longer than 120 s or less than 90 %
was reused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.compiler.published_configs import LLAMA_3_1_8B, QWEN3_30B_A3B

MODELS = {"Llama-3.1-8B": LLAMA_3_1_8B, "Qwen3-30B-A3B": QWEN3_30B_A3B}
MAX_SECONDS, MIN_REUSED = 120, 0.9


def warm_up(folder: Path, config: dict[str, Any], target: str, jobs: int, store: Path) -> dict[str, Any]:
    """One ``graphserve warmup`` in a process of its own: its wall time, and its artifacts by state."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    command = [
        sys.executable, "-m", "graphserve", "warmup", str(folder), "--target", target, "--jobs", str(jobs),
        "--output", str(store), "--report",
    ]  # fmt: skip
    # Triton has a cache of its own below ours: it starts as empty as the store.
    environment = {**os.environ, "GRAPHSERVE_CACHE": str(store.parent / "cache")}
    begin = time.monotonic()
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    if result.returncode != 0:
        raise SystemExit(result.stderr)
    artifacts = json.loads(result.stdout)["artifacts"]
    states = Counter(row["state"] for row in artifacts)
    return {
        "seconds": round(seconds, 1),
        "built": states["built"],
        "reused": round(states["stored"] / len(artifacts), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cuda:90")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name, config in MODELS.items():
        half = {**config, "num_hidden_layers": config["num_hidden_layers"] // 2}
        with tempfile.TemporaryDirectory(prefix="graphserve-warmup-") as scratch:
            root = Path(scratch)
            first = warm_up(root / "first", config, args.target, args.jobs, root / "store")
            second = warm_up(root / "second", half, args.target, args.jobs, root / "store")
        results[name] = {"first": first, "half_depth": second}
        sys.stdout.write(
            f"{name}: {first['seconds']} s for {first['built']} artifacts; half its depth: {second['seconds']} s, "
            f"{100 * second['reused']:.1f} % reused\n"
        )
        sys.stdout.flush()
    document = {
        "benchmark": "warmup_time",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m benchmarks.warmup_time --target {args.target} --jobs {args.jobs}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "triton")},
        "results": results,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document) + "\n")
    fits = all(
        result["first"]["seconds"] < MAX_SECONDS and result["half_depth"]["reused"] > MIN_REUSED
        for result in results.values()
    )
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
