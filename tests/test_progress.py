"""Phases: events, and how a terminal and a log file see them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest

from graphserve import progress
from graphserve.progress import PhaseEvent, StreamSink, byte_reporter, format_bytes, phase


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def events() -> Iterator[list[PhaseEvent]]:
    seen: list[PhaseEvent] = []
    previous = progress.set_sink(seen.append)
    yield seen
    progress.set_sink(previous)


def test_a_phase_begins_advances_and_ends(events: list[PhaseEvent]) -> None:
    with phase("load", total=3, unit="files") as work:
        work.advance()
        work.advance(2)
        work.note = "all local"
    assert [(event.state, event.done) for event in events] == [("begin", 0), ("advance", 1), ("advance", 3), ("end", 3)]
    assert events[-1].note == "all local" and events[-1].seconds >= events[1].seconds >= 0


def test_a_phase_that_raises_fails_and_the_error_goes_on(events: list[PhaseEvent]) -> None:
    with pytest.raises(KeyError), phase("load"):
        raise KeyError("x")
    assert events[-1].state == "fail"


def test_without_a_sink_a_phase_costs_nothing_and_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with phase("load") as work:
        work.advance()
    assert capfd.readouterr() == ("", "")


def test_a_log_file_gets_one_plain_line_a_phase() -> None:
    stream = io.StringIO()
    sink = StreamSink(stream, {})
    for event in (
        PhaseEvent("load", "begin", total=2, unit="files"),
        PhaseEvent("load", "advance", 1, 2, "files", 0.5),
        PhaseEvent("load", "end", 2, 2, "files", 1.25, "local"),
    ):
        sink(event)
    assert stream.getvalue() == "load: done in 1.25 s (2 files, local)\n"


def test_a_long_phase_is_mentioned_again_every_five_seconds_in_a_log_file() -> None:
    stream = io.StringIO()
    sink = StreamSink(stream, {})
    sink(PhaseEvent("load", "begin", total=100))
    for second in range(12):
        sink(PhaseEvent("load", "advance", second, 100, "", float(second)))
    assert stream.getvalue() == "  load: 5 of 100 after 5.0 s\n  load: 10 of 100 after 10.0 s\n"


@pytest.mark.parametrize(("environ", "has_color"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_gets_a_bar_that_the_closing_line_replaces(environ: dict[str, str], has_color: bool) -> None:
    stream = Terminal()
    sink = StreamSink(stream, environ)
    sink(PhaseEvent("load", "begin", total=4))
    sink(PhaseEvent("load", "advance", 2, 4, "", 1.0))
    sink(PhaseEvent("load", "fail", 2, 4, "", 2.0))
    shown = stream.getvalue()
    assert "[############............] 2 of 4" in shown and shown.endswith("load: failed after 2.00 s (2 of 4)\n")
    assert bool(re.search("\x1b\\[3[12]m", shown)) == has_color


def test_a_byte_callback_becomes_a_phase(events: list[PhaseEvent]) -> None:
    report = byte_reporter()
    for done in (0, 600, 1200):
        report("download", done, 1200)
    assert [event.state for event in events] == ["begin", "advance", "advance", "end"]
    assert all(event.unit == "B" and event.total == 1200 for event in events)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**41, "2.0 TiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_fits(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
