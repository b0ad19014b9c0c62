"""The whole test suite, the tests marked ``full`` included, and its result as JSON.

    python -m benchmarks.full_tests                 # everything, about an hour on two cores
    python -m benchmarks.full_tests tests/runtime   # a part, printed but not stored

Runs ``pytest -m ''`` and writes counts, failures, skip reasons and the slowest tests to
``benchmarks/results/full_tests.json``. Exit code as pytest's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.coverage import machine

RESULTS = Path(__file__).resolve().parent / "results" / "full_tests.json"
PACKAGES = ("torch", "triton", "transformers", "pytest", "hypothesis")
NUM_SLOWEST = 15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="files or folders; default: all tests, whose result is stored")
    parser.add_argument("-n", "--workers", default="2", help="test processes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "", "-n", args.workers, "--dist", "loadfile", "--show-capture=no"]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *args.paths]
        code = subprocess.run(command, check=False).returncode
        result = summarise(ElementTree.parse(report).getroot())
    shown = " ".join(["pytest", *(option or "''" for option in options), *args.paths])
    document = {"command": shown, "exit_code": code, "environment": environment(), **result}
    if not args.paths:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: value for key, value in document.items() if key not in ("slowest", "skipped_because")}))
    return code


def summarise(root: ElementTree.Element) -> dict[str, Any]:
    """Counts and names from a JUnit report."""
    outcomes: Counter[str] = Counter()
    skips: Counter[str] = Counter()
    failures: list[str] = []
    seconds: dict[str, float] = {}
    for case in root.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        seconds[name] = float(case.get("time", 0))
        outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        outcomes[outcome] += 1
        if outcome == "skipped":
            found = case.find("skipped")
            skips[str(found.get("message") if found is not None else "")] += 1
        elif outcome != "passed":
            failures.append(name)
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:NUM_SLOWEST]
    return {
        "passed": outcomes["passed"],
        "failed": outcomes["failure"] + outcomes["error"],
        "skipped": outcomes["skipped"],
        "test_seconds": round(sum(seconds.values()), 1),
        "failures": failures,
        "skipped_because": dict(skips),
        "slowest": {name: round(value, 1) for name, value in slowest},
    }


def environment() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": machine(),
        **{name: version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    sys.exit(main())
