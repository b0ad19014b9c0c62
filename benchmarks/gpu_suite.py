"""One GPU's tests and measurements in one command of at most nine minutes.

    python -m benchmarks.gpu_suite [--output benchmarks/results] [--minutes 9] [--skip tests,...]

Sections, in order:

* environment
* rates: read bandwidth and bf16 matrix rate of the device, to which the others are compared, and copies from the host
* kernels: GB/s or TFLOP/s beside the library call a user would pick
* logits: three layers of the 8B Llama shape beside eager ``transformers``, all positions
* memory: the memory plan of a 0.5B shape beside what the driver reports
* startup: seconds to the first token on the device, cold, tiered and warm, phase by phase
* captures, decode, gaps, sampling, nodes, prefill, timeline: whole steps of an 8B Llama shape with random weights
* text: the demo model's greedy text out of that shape, before and after a sleep
* choices: what ``warmup --measure`` finds for that shape, and what it gains
* tests: ``tests/gpu`` in several processes, then those that need the device alone

Times are medians of CUDA events. A section that fails is reported with its traceback and the rest still runs. With
``--output`` a file ``gpu_<device>_<date>.json`` is written there, anew after each section; the last stdout line is the
same JSON document. ``python -m benchmarks.plot_gpu FILE`` draws it.
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

from benchmarks import gpu_step
from benchmarks.gpu_choices import measure_choices
from benchmarks.gpu_decode import measure_decode
from benchmarks.gpu_kernels import measure_kernels
from benchmarks.gpu_logits import measure_logits
from benchmarks.gpu_model import GpuModel, load_model
from benchmarks.gpu_rates import measure_rates
from benchmarks.gpu_text import measure_text
from benchmarks.gpu_timeline import measure_timeline

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


def run_tests(deadline: Deadline) -> dict[str, Any]:
    """``tests/gpu`` dealt over processes; what was not finished in the time left counts as such.

    A fifth of that time is kept for the tests that run alone, after the others.
    """
    seconds = deadline.left() - 5
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
    runs = _run_together(parts, end - seconds / 5)
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


def run_benchmark(module: str, *options: str) -> dict[str, Any]:
    """What another benchmark's last line says, run in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if not lines:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


class SharedModel:
    """The model of several sections: made by the first that needs it, unless that has failed already."""

    def __init__(self) -> None:
        self._model: GpuModel | None = None
        self._has_failed = False

    def get(self) -> GpuModel:
        """The model, loaded now if need be.

        Raises:
            RuntimeError: it could not be loaded for an earlier section.
        """
        if self._has_failed:
            raise RuntimeError("the model could not be loaded: see the section before")
        if self._model is None:
            self._has_failed = True
            self._model = load_model()
            self._has_failed = False
        return self._model

    def close(self) -> None:
        """Give its memory back."""
        model, self._model = self._model, None
        if model is not None:
            model.close()


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


def has_failed(value: Any) -> bool:
    """Whether a section, or a row of one, has the text of an error or says that what it checks does not hold."""
    if isinstance(value, list):
        return any(map(has_failed, value))
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("error"), str) or value.get("holds") is False or any(map(has_failed, value.values()))


def file_name(document: dict[str, Any]) -> str:
    device = document.get("environment", {}).get("result", {}).get("device", "unknown")
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
    model = SharedModel()
    sections: dict[str, tuple[Callable[[], Any], float]] = {
        "environment": (environment, 0),
        "rates": (measure_rates, 20),
        "kernels": (lambda: measure_kernels(deadline.left, reserve_s=20), 45),
        "logits": (lambda: measure_logits(torch.device("cuda")), 60),
        "memory": (lambda: run_benchmark("memory_plan", "--device", "cuda"), 60),
        "startup": (lambda: run_benchmark("startup", "--runs", "2"), 60),
        # First of those on the model: nothing of it has been captured yet.
        "captures": (lambda: gpu_step.measure_captures(model.get()), 75),
        "decode": (lambda: measure_decode(model.get(), deadline.left), 30),
        "gaps": (lambda: gpu_step.measure_gaps(model.get()), 20),
        "sampling": (lambda: gpu_step.measure_sampling(model.get()), 20),
        "nodes": (lambda: gpu_step.measure_nodes(model.get()), 20),
        "prefill": (lambda: gpu_step.measure_prefill(model.get()), 20),
        "timeline": (lambda: measure_timeline(model.get()), 30),
        "text": (lambda: measure_text(model.get(), torch.device("cuda")), 20),
        "choices": (lambda: measure_choices(model.get(), deadline.left), 30),
        "release": (model.close, 0),
        "tests": (lambda: run_tests(deadline), 60),
    }
    skipped = set(filter(None, args.skip.split(",")))
    if unknown := skipped - set(sections):
        parser.error(f"--skip has {', '.join(sorted(unknown))}: sections are {', '.join(sections)}")
    document: dict[str, Any] = {"benchmark": "gpu_suite", "date": time.strftime("%Y-%m-%d")}
    document["command"] = f"python -m benchmarks.gpu_suite --minutes {args.minutes:g}"
    if skipped:
        document["command"] += f" --skip {args.skip}"
    for name, (work, needs_s) in sections.items():
        if name not in skipped:
            document[name] = run_section(name, work, deadline, needs_s)
            torch.cuda.empty_cache()
            if args.output is not None:
                args.output.mkdir(parents=True, exist_ok=True)
                (args.output / file_name(document)).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    tests = document.get("tests", {}).get("result", {})
    return int(has_failed(document) or bool(tests.get("failures")) or bool(tests.get("not_finished")))


if __name__ == "__main__":
    sys.exit(main())
