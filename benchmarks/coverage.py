"""The coverage job: every causal-LM architecture of the installed `transformers`, compiled tiny and compared with HF.

    python -m benchmarks.coverage                       # what has no result yet
    python -m benchmarks.coverage --only llama,phi3:longrope --redo all
    python -m benchmarks.coverage --redo wrong,error    # again where something is amiss
    python -m benchmarks.coverage --backend cpp --only named

One subprocess an architecture, with a time and a memory limit. Results are written after each; the table is rendered
at the end. The last line of stdout is a JSON summary. Exit code 1 when anything is wrong or a named architecture is
not right.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.coverage_configs import NAMED, NAMED_RIGHT_OR_REFUSED
from graphserve.processors import processor_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
TABLE = ROOT / "benchmarks" / "COVERAGE.md"
BACKENDS = ("reference", "cpp")
DENSE_LAUNCHES = 10

# One process loads torch, transformers and the compiler; each architecture runs in a fork of it.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["benchmarks.coverage_check", "torch._dynamo"])

Row = dict[str, Any]


def main() -> int:
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the subprocesses when they load torch
    results = Results(args.results)
    names = select_names(args.only)
    pending = [name for name in names if wants_run(results.rows.get(f"{name}@{args.backend}"), args.redo)]
    report(f"{len(names)} architectures, {len(pending)} to run on backend {args.backend}")
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = pool.map(lambda name: run_one(name, args.backend, args.timeout, args.memory_gb), pending)
        for i, row in enumerate(rows):
            results.store(row)
            outcome = f"{row['result']} {row['seconds']:.1f} s {row['reason'][:160]}"
            report(f"[{i + 1}/{len(pending)}] {row['name']}: {outcome}")
    args.table.write_text(render_table(results))
    summary = summarise(results)
    print(json.dumps(summary))
    return 1 if summary["wrong"] or summary["named_not_right"] else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated names, or 'named'; default: everything")
    parser.add_argument("--redo", default="", help="'all' or results to run again, such as wrong,error")
    parser.add_argument("--backend", choices=BACKENDS, default="reference")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one architecture")
    parser.add_argument("--memory-gb", type=float, default=12.0, help="address space of one subprocess")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    return parser.parse_args()


def select_names(only: str | None) -> list[str]:
    if only == "named":
        return [*NAMED, *NAMED_RIGHT_OR_REFUSED]
    from tests.tiny_models import architectures

    if not only:
        return architectures()
    names = only.split(",")
    if unknown := sorted(set(names) - set(architectures())):
        raise SystemExit(f"unknown architectures {unknown}: give names of transformers' causal-LM mapping or variants")
    return names


def wants_run(row: Row | None, redo: str) -> bool:
    """True for an architecture without a result of the installed versions, or with a result named by `redo`."""
    import torch
    import transformers

    if row is None or (row["transformers"], row["torch"]) != (transformers.__version__, torch.__version__):
        return True
    return redo == "all" or row["result"] in redo.split(",")


def work(sender: Connection, name: str, backend: str, memory_gb: float) -> None:
    """The subprocess: one architecture, its row sent as JSON."""
    limit_bytes = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    import msgspec
    import torch
    import transformers

    from benchmarks.coverage_check import check_architecture

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sender.send_bytes(msgspec.json.encode(check_architecture(name, backend)))


def run_one(name: str, backend: str, timeout_s: float, memory_gb: float) -> Row:
    """Run one architecture in a subprocess; a crash or a timeout becomes a row, too."""
    start = time.perf_counter()
    receiver, sender = FORK_SERVER.Pipe(duplex=False)
    process = FORK_SERVER.Process(target=work, args=(sender, name, backend, memory_gb), name=name)
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout_s):
            return json.loads(receiver.recv_bytes())
        reason = f"no result within {timeout_s:.0f} s"
    except EOFError:
        process.join()
        reason = f"the process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return failed_row(name, backend, reason, time.perf_counter() - start)


def failed_row(name: str, backend: str, reason: str, seconds: float) -> Row:
    import msgspec

    from benchmarks.coverage_check import CoverageRow

    row = CoverageRow(name=name, backend=backend, result="error", reason=reason, seconds=round(seconds, 2))
    return msgspec.to_builtins(row)


class Results:
    """Rows by `name@backend`, kept in a file that is replaced as a whole after each row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, Row] = json.loads(path.read_text())["rows"] if path.exists() else {}

    def store(self, row: Row) -> None:
        self.rows[f"{row['name']}@{row['backend']}"] = row
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        document = {"environment": environment(), "rows": dict(sorted(self.rows.items()))}
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(self._path)

    def of(self, backend: str) -> list[Row]:
        return [row for row in self.rows.values() if row["backend"] == backend]


def environment() -> dict[str, str]:
    return {"date": datetime.date.today().isoformat(), "python": platform.python_version(), "machine": machine()}


def machine() -> str:
    return f"{processor_name()}, {os.cpu_count()} threads"


def summarise(results: Results) -> dict[str, Any]:
    """Counts over the architectures proper (variants count in `wrong` and in the named list, not as architectures)."""
    rows = results.of("reference")
    counts = Counter(row["result"] for row in rows if ":" not in row["name"])
    by_name = {row["name"]: row["result"] for row in rows}
    not_right = [name for name in NAMED if by_name.get(name) != "right"]
    not_right += [name for name in NAMED_RIGHT_OR_REFUSED if by_name.get(name) not in ("right", "refused")]
    return {
        "architectures": sum(counts.values()),
        **{result.replace(" ", "_"): counts[result] for result in ("right", "refused", "error", "hf cannot run")},
        "wrong": sum(row["result"] == "wrong" for row in results.rows.values()),
        "named_right": len(NAMED) + len(NAMED_RIGHT_OR_REFUSED) - len(not_right),
        "named_not_right": not_right,
        "dense_within": sum(_is_within(row) for row in rows if ":" not in row["name"]),
        "gpu_whole": sum(
            bool(row["gpu_launches"]) and not row["gpu_leftovers"] for row in rows if ":" not in row["name"]
        ),
        "cpp_right": sum(row["result"] == "right" for row in results.of("cpp")),
        "cpp_not_right": [row["name"] for row in results.of("cpp") if row["result"] != "right"],
    }


def _is_within(row: Row) -> bool:
    """Whether an architecture is right, has dense layers and launches few enough kernels in each on a GPU."""
    return row["result"] == "right" and 0 < row["gpu_launches"].get("dense", 0) <= DENSE_LAUNCHES


def render_table(results: Results) -> str:
    summary = summarise(results)
    rows = sorted(results.of("reference"), key=lambda row: (row["result"] != "right", row["result"], row["name"]))
    cpp = {row["name"]: row["result"] for row in results.of("cpp")}
    versions = sorted({f"transformers {row['transformers']}, torch {row['torch']}" for row in rows})
    counts = f"{summary['right']} of {summary['architectures']} right, {summary['wrong']} wrong, "
    counts += f"{summary['refused']} refused, {summary['error']} errors, {summary['hf_cannot_run']} that transformers "
    counts += f"cannot run as a text decoder. Through compiled CPU launches: {summary['cpp_right']} right. "
    counts += f"On a GPU at most {DENSE_LAUNCHES} launches per dense layer: {summary['dense_within']}; "
    counts += f"no eager op at all: {summary['gpu_whole']}."
    lines = [
        "# Coverage: every causal-LM architecture of transformers",
        "",
        counts,
        "",
        f"Made by `python -m benchmarks.coverage` on {environment()['date']} ({'; '.join(versions)}; {machine()}).",
        "A tiny random model each (window 8, chunk 16, every layer type, at least four layers); three packed requests",
        "of 5, 37 and 90 tokens in chunks of 16, then 12 decode steps. *Right*: the logits of every position are",
        "within 1e-4 of transformers' for the request alone, and replacing one request moves no other's by more than",
        "1e-5 through the plain-torch references; through generated C++ it must leave every bit as it was. Launches",
        "per layer and leftovers (ops that would run eagerly) are those of the bfloat16 plan for cuda:90.",
        "",
        "| architecture | result | compiled | launches per dense layer | per MoE layer | leftovers "
        "| traced | guards on T | attention rules | matches | max error | reason |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rules = "; ".join(f"{layer}: {rule}" for layer, rule in row["rules"].items())
        matches = ", ".join(f"{name} {n}" for name, n in row["matches"].items() if n)
        error = "" if row["max_relative_error"] is None else f"{row['max_relative_error']:.1e}"
        gpu = row["gpu_launches"]
        leftovers = ", ".join(f"{op} {n}" for op, n in row["gpu_leftovers"].items()) or ("none" if gpu else "")
        cells = [row["name"], row["result"], cpp.get(row["name"], "")]
        cells += [str(gpu.get("dense", "")), str(gpu.get("moe", "")), leftovers, "yes" if row["traced"] else "no"]
        guards = ", ".join(row["guards"]) or ("none" if row["traced"] else "")
        cells += [guards, rules, matches, error, row["reason"][:200]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
