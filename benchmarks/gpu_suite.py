"""One GPU's tests and measurements in one command of at most nine minutes.

    python -m benchmarks.gpu_suite [--output benchmarks/results] [--minutes 9] [--skip tests,...]

Sections, in order: environment; tests (``tests/gpu`` in several processes, then those that need the device alone);
rates (read bandwidth and bf16 matrix rate of the device, to which the others are compared); kernels (GB/s or TFLOP/s
beside the library call a user would pick); decode (whole captured steps of an 8B Llama shape with random weights).
Times are medians of CUDA events; between repetitions a buffer larger than the L2 cache is overwritten. A section that
fails is reported with its traceback and the rest still runs. With ``--output`` a file ``gpu_<device>_<date>.json`` is
written there; the last stdout line is the same JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_decode import measure_decode
from benchmarks.gpu_kernels import measure_kernels
from benchmarks.gpu_timing import median_us

REPOSITORY = Path(__file__).resolve().parent.parent
# Compiling takes most of the tests' time. A process needs some 3 GB of memory.
TEST_PROCESSES = max(2, min(12, (os.cpu_count() or 4) - 2))
# Tests that read how much of the device's memory is free run when no other process uses it.
ALONE = "tests/gpu/test_sleep.py::"
_OUTCOME = re.compile(r"^(tests/\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
# Options of pyproject.toml that need a plugin or turn a library's warning into an error are left out.
_PYTEST = [sys.executable, "-m", "pytest", "--override-ini", "filterwarnings=default", "--override-ini",
           "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]  # fmt: skip


class Deadline:
    """Seconds that are left of the run."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self._end - time.monotonic()


def environment() -> dict[str, Any]:
    """Device, driver and versions."""
    properties = torch.cuda.get_device_properties(0)
    versions = {name: metadata.version(name) for name in ("torch", "triton", "transformers")}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver, clock, power limit": driver,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **versions,
    }


def run_tests(deadline: Deadline, share: float = 0.65) -> dict[str, Any]:
    """``tests/gpu`` dealt over processes; what was not finished in ``share`` of the time left counts as such.

    A quarter of that time is kept for the tests that run alone, after the others.
    """
    seconds = deadline.left() * share
    end = time.monotonic() + seconds
    collected = subprocess.run(
        [*_PYTEST, "--collect-only", "-q", "tests/gpu"], cwd=REPOSITORY, capture_output=True, text=True
    )
    ids = [line for line in collected.stdout.splitlines() if line.startswith("tests/gpu/")]
    if not ids:
        raise RuntimeError(f"no test was collected: {collected.stdout[-1500:]} {collected.stderr[-1500:]}")
    together = [name for name in ids if not name.startswith(ALONE)]
    alone = [name for name in ids if name.startswith(ALONE)]
    # Every n-th test: neighbours share parameters and take about as long.
    parts = [part for i in range(TEST_PROCESSES) if (part := together[i::TEST_PROCESSES])]
    runs = _run_together(parts, end - seconds / 4)
    if alone:
        runs += _run_together([alone], end)
    outcomes = {name: word.lower() for run in runs for name, word in _OUTCOME.findall(run.output)}
    bad = [name for name, word in outcomes.items() if word in ("failed", "error")]
    counts = {word: sum(o == word for o in outcomes.values()) for word in ("passed", "failed", "error", "skipped")}
    return {
        "collected": len(ids),
        **counts,
        "not_finished": len(ids) - len(outcomes),
        "cut_by_time": any(run.is_cut for run in runs),
        "failures": bad,
        # The end of each process that did not pass: tracebacks and pytest's own summary.
        "logs": [run.output[-8000:] for run in runs if run.return_code not in (0, 5)],
    }


class TestRun(NamedTuple):
    """What became of one process of tests; ``is_cut`` if it had to be ended."""

    output: str
    return_code: int
    is_cut: bool


def _run_together(parts: list[list[str]], end: float) -> list[TestRun]:
    """A process for each list of tests, all at a time, until ``end`` of the monotonic clock."""
    # Without the captured log: torch's own fills pages, and pushes out the tracebacks.
    command = [*_PYTEST, "-v", "--tb=short", "--show-capture=no"]
    cut = set()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.txt" for i in range(len(parts))]  # files: an unread pipe would stop its process
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for log, part in zip(logs, parts, strict=True):
                with log.open("wb") as file:
                    processes.append(
                        subprocess.Popen([*command, *part], cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
                    )
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.0, end - time.monotonic()))
        finally:
            for process in processes:
                if process.poll() is None:
                    cut.add(process.pid)
                    process.kill()
                    process.wait()
        return [
            TestRun(log.read_text(errors="replace"), process.returncode, process.pid in cut)
            for log, process in zip(logs, processes, strict=True)
        ]


def measure_rates() -> dict[str, float]:
    """Rates of the device that torch reaches: reading and copying 8 GB, and a bf16 product."""
    read, copy = _memory_rates(1 << 31)
    torch.cuda.empty_cache()
    return {"read_gb_s": round(read), "copy_gb_s": round(copy), "bf16_mm_tflop_s": round(_product_rate(8192), 1)}


def _memory_rates(num_floats: int) -> tuple[float, float]:
    """GB/s of a sum, and of a copy with reads and writes counted."""
    data = torch.ones(num_floats, dtype=torch.float32, device="cuda")
    copied = torch.empty_like(data)
    num_bytes = 4 * num_floats
    read_us = median_us(lambda: torch.sum(data), repeats=10)
    copy_us = median_us(lambda: copied.copy_(data), repeats=10)
    return num_bytes / read_us / 1e3, 2 * num_bytes / copy_us / 1e3


def _product_rate(size: int) -> float:
    """TFLOP/s of a square bf16 product."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_us(lambda: torch.mm(a, b, out=out), repeats=20) / 1e6


def run_section(name: str, work: Callable[[], Any], deadline: Deadline, needs_s: float) -> dict[str, Any]:
    """The suite's isolation boundary: whatever a section raises is its result, and the next section runs."""
    if deadline.left() < needs_s:
        return {"skipped": f"{deadline.left():.0f} s were left, the section needs {needs_s:.0f} s"}
    start = time.monotonic()
    try:
        result = {"result": work()}
    except Exception:  # noqa: BLE001 - see above
        result = {"error": traceback.format_exc()[-6000:]}
    result["seconds"] = round(time.monotonic() - start, 1)
    print(f"{name}: {'failed' if 'error' in result else 'done'} in {result['seconds']} s", file=sys.stderr, flush=True)
    return result


def has_error(value: Any) -> bool:
    """Whether a section, or a row of one, holds the text of an error."""
    if isinstance(value, list):
        return any(map(has_error, value))
    return isinstance(value, dict) and (isinstance(value.get("error"), str) or any(map(has_error, value.values())))


def file_name(document: dict[str, Any]) -> str:
    device = document["environment"].get("result", {}).get("device", "unknown")
    return f"gpu_{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}_{document['date']}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the result's file")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section starts that would end later")
    parser.add_argument("--skip", default="", help="sections to leave out, separated by commas")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_suite needs a CUDA device: torch.cuda.is_available() is false", file=sys.stderr)
        return 2
    deadline = Deadline(args.minutes)
    torch.set_float32_matmul_precision("highest")
    sections: dict[str, tuple[Callable[[], Any], float]] = {
        "environment": (environment, 0),
        "tests": (lambda: run_tests(deadline), 60),
        "rates": (measure_rates, 20),
        "kernels": (lambda: measure_kernels(deadline.left), 45),
        "decode": (lambda: measure_decode(deadline.left), 75),
    }
    document: dict[str, Any] = {"benchmark": "gpu_suite", "date": time.strftime("%Y-%m-%d")}
    for name, (work, needs_s) in sections.items():
        if name not in args.skip.split(","):
            document[name] = run_section(name, work, deadline, needs_s)
            torch.cuda.empty_cache()
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / file_name(document)).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    tests = document.get("tests", {}).get("result", {})
    return int(has_error(document) or bool(tests.get("failures")) or bool(tests.get("not_finished")))


if __name__ == "__main__":
    sys.exit(main())
