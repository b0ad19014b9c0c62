"""Where the time of a start goes: from the birth of the process to its first token, phase by phase."""

from __future__ import annotations

import atexit
import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphserve.artifacts.cache_dir import cache_dir
from graphserve.artifacts.locks import process_lock
from graphserve.processors import available_processors
from graphserve.progress import PhaseEvent, Sink

_IMPORT_TIMEOUT_S = 20.0  # a process that takes longer is stopped or stuck: nobody waits for it


def process_age_s() -> float:
    """Seconds since the kernel started this process, to 10 ms; 0 where that cannot be known."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        born_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - born_s)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


@contextmanager
def without_collector() -> Iterator[None]:
    """Load a model in the body, in a process that serves nothing else: garbage collection rests until it is loaded.

    Imports and plans make very many objects, and nearly all of them stay: walking them again and again is a good part
    of importing torch and transformers. What is there at the end is left out of all later collections.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
        atexit.register(gc.unfreeze)  # extension modules complain at exit of objects that were never collected
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def import_turn() -> Iterator[None]:
    """Import torch in the body, one process a processor at a time.

    Of many that start together all would be interrupted all the time, and find the caches filled by the others. Taking
    turns keeps none of them waiting longer, and takes less processor time of all.
    """
    turn = os.getpid() % available_processors()
    with process_lock(cache_dir() / "locks" / f"import-{turn}", _IMPORT_TIMEOUT_S, "an import of torch"):
        yield


class StartupClock:
    """A sink of phases that remembers when each ran, and hands every event on until the first token is out.

    Only phases without phases inside them count, so that a large one around everything explains nothing.
    """

    def __init__(self, forward: Sink | None = None) -> None:
        now = time.monotonic()
        self._forward = forward
        self._born = now - process_age_s()
        self._open: list[bool] = []  # for each phase that runs: whether another ran inside it
        self._spans: list[tuple[str, float, float]] = [("start Python", self._born, now)]
        self._end: float | None = None

    def __call__(self, event: PhaseEvent) -> None:
        """Take one event of a phase."""
        if event.state == "begin":
            self._open = [True] * len(self._open) + [False]
        elif event.state in ("end", "fail") and self._open and not self._open.pop():
            now = time.monotonic()
            self._spans.append((event.name, now - event.seconds, now))
        if self._forward is not None and self._end is None:  # after that it would be drawn over the answer
            self._forward(event)

    def first_token(self, asked_at: float) -> None:
        """Note that the first token is out; later calls and phases change nothing.

        Args:
            asked_at: when the request was made, by the monotonic clock.
        """
        if self._end is None:
            self._end = time.monotonic()
            self._spans.append(("first step", asked_at, self._end))

    def report(self) -> dict[str, Any]:
        """Seconds in all, of each phase in order, and of no phase."""
        end = self._end if self._end is not None else time.monotonic()
        phases: list[dict[str, Any]] = []
        explained, reached = 0.0, self._born
        for name, begin, until in sorted(self._spans, key=lambda span: span[1]):
            if begin < end:
                phases.append({"name": name, "seconds": round(min(until, end) - begin, 4)})
                explained += max(0.0, min(until, end) - max(begin, reached))
                reached = max(reached, until)
        total = end - self._born
        return {
            "seconds_to_first_token": round(total, 4),
            "phases": phases,
            "unexplained_seconds": round(total - explained, 4),
        }

    def write(self, path: Path) -> None:
        """The report as a JSON file."""
        path.write_text(json.dumps(self.report(), indent=1) + "\n")

    def __str__(self) -> str:
        report = self.report()
        total, rest = report["seconds_to_first_token"], report["unexplained_seconds"]
        return f"{total:.2f} s from the start of the process to the first token, {rest:.2f} s of them in no phase"
