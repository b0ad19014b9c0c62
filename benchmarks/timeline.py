"""A traced decode step: the device's spans in the order of time, and the time without any. No torch."""

from __future__ import annotations

from typing import Any, NamedTuple

FIRST, LAST = "step_prologue", "step_epilogue"  # in the names of a step's outermost kernels
_MAX_NAME = 60  # the library's kernels have names of hundreds of characters


class Span(NamedTuple):
    """A kernel or copy on the device, in microseconds."""

    begin: float
    duration: float
    name: str

    @property
    def end(self) -> float:
        return self.begin + self.duration


def spans_of(trace: dict[str, Any]) -> list[Span]:
    """The device's spans of a Chrome trace, in the order of time."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [event for event in trace["traceEvents"] if event.get("cat") in kinds]
    return sorted(Span(float(e["ts"]), float(e["dur"]), str(e["name"])[:_MAX_NAME]) for e in events)


def describe(spans: list[Span]) -> dict[str, Any]:
    """The last but one whole step of several.

    Raises:
        ValueError: there are not three whole steps.
    """
    begins = [i for i, span in enumerate(spans) if FIRST in span.name]
    ends = [i for i, span in enumerate(spans) if LAST in span.name]
    if len(begins) < 3 or len(begins) != len(ends):
        raise ValueError(f"{len(begins)} kernels {FIRST} and {len(ends)} {LAST} among {len(spans)} spans")
    step = spans[begins[-2] : ends[-2] + 1]
    start = step[0].begin
    between = [spans[b].begin - spans[e].end for e, b in zip(ends, begins[1:], strict=False)]
    total = max(span.end for span in step) - start
    return {
        "total_us": round(total, 2),
        "idle_us": round(total - _covered(step), 2),
        "between_steps_us": [round(gap, 2) for gap in between],
        "spans": [f"{span.begin - start:.2f} {span.duration:.2f} {span.name}" for span in step],
    }


def parse_span(text: str) -> Span:
    """A span as :func:`describe` writes it."""
    begin, duration, name = text.split(" ", 2)
    return Span(float(begin), float(duration), name)


def _covered(spans: list[Span]) -> float:
    """Microseconds in which at least one span runs; they are in the order of their begin."""
    covered, reached = 0.0, spans[0].begin
    for span in spans:
        covered += max(0.0, span.end - max(reached, span.begin))
        reached = max(reached, span.end)
    return covered
