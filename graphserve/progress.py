"""Named phases of long work (load, trace, compile, ...): what runs, how far it is, how long it took.

Library code opens a phase and advances it; it never writes anywhere itself:

    with progress.phase("load weights", total=num_bytes, unit="B") as work:
        for tensor in tensors:
            work.advance(tensor.nbytes)

Every change becomes a :class:`PhaseEvent` for the one installed sink. Without a sink the events are dropped. The
command line installs a :class:`StreamSink` (a bar on a terminal, timed lines elsewhere); the engine process installs
a sink that sends the events to its parent, which replays them into its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

import msgspec

_REDRAW_S = 0.1  # a bar redrawn more often than this only flickers
_LINE_S = 5.0  # without a terminal, a running phase is mentioned again this often


class PhaseEvent(msgspec.Struct, frozen=True):
    """One change of one phase. ``total`` is None when the amount of work is not known; ``seconds`` since the begin."""

    name: str
    state: Literal["begin", "advance", "end", "fail"]
    done: int = 0
    total: int | None = None
    unit: str = ""
    seconds: float = 0.0
    note: str = ""


Sink = Callable[[PhaseEvent], None]

_sink: Sink | None = None


def set_sink(sink: Sink | None) -> Sink | None:
    """Install the receiver of all phase events of this process; returns the previous one."""
    global _sink
    previous, _sink = _sink, sink
    return previous


def emit(event: PhaseEvent) -> None:
    """Hand an event to the installed sink (also used to replay another process's events)."""
    if _sink is not None:
        _sink(event)


class Phase:
    """The handle of a running phase; made by :func:`phase`."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0
        self.note = ""
        self._begin = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        """Count ``amount`` units as done."""
        self.done += amount
        self._send("advance")

    def _send(self, state: Literal["begin", "advance", "end", "fail"]) -> None:
        seconds = time.monotonic() - self._begin
        emit(PhaseEvent(self.name, state, self.done, self.total, self.unit, seconds, self.note))


@contextmanager
def phase(name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
    """Report the body of the ``with`` as one phase. Set ``.note`` on the handle to add words to the closing line."""
    work = Phase(name, total, unit)
    work._send("begin")
    try:
        yield work
    except BaseException:
        work._send("fail")
        raise
    work._send("end")


class StreamSink:
    """Writes phases to a text stream: a bar on a terminal, timed lines otherwise.

    A finished phase leaves exactly one line. ``NO_COLOR`` (any value) switches colours off, as no-color.org asks.
    """

    def __init__(self, stream: TextIO | None = None, environ: dict[str, str] | None = None) -> None:
        self._stream = stream or sys.stderr
        env = os.environ if environ is None else environ
        self._is_terminal = self._stream.isatty() and env.get("TERM") != "dumb"
        self._has_color = self._is_terminal and not env.get("NO_COLOR")
        self._next_write_s = 0.0

    def __call__(self, event: PhaseEvent) -> None:
        if event.state in ("end", "fail"):
            self._finish(event)
        elif self._is_terminal:
            if event.state == "begin" or event.seconds >= self._next_write_s:
                self._next_write_s = event.seconds + _REDRAW_S
                self._stream.write(f"\r\x1b[K  {event.name} {_bar(event)}")
                self._stream.flush()
        elif event.state == "begin":
            self._next_write_s = _LINE_S
        elif event.seconds >= self._next_write_s:
            self._next_write_s = event.seconds + _LINE_S
            self._stream.write(f"  {event.name}: {_amount(event)} after {event.seconds:.1f} s\n")
            self._stream.flush()

    def _finish(self, event: PhaseEvent) -> None:
        words = [part for part in (_amount(event), event.note) if part]
        outcome = "failed after" if event.state == "fail" else "done in"
        detail = f" ({', '.join(words)})" if words else ""
        mark = ""
        if self._is_terminal:
            symbol, color = ("✗", "31") if event.state == "fail" else ("✓", "32")
            mark = f"\x1b[{color}m{symbol}\x1b[0m " if self._has_color else f"{symbol} "
            self._stream.write("\r\x1b[K")
        self._stream.write(f"{mark}{event.name}: {outcome} {event.seconds:.2f} s{detail}\n")
        self._stream.flush()


def _bar(event: PhaseEvent, width: int = 24) -> str:
    if not event.total:
        return f"… {_amount(event)}".rstrip()
    filled = min(width, width * event.done // event.total)
    return f"[{'#' * filled}{'.' * (width - filled)}] {_amount(event)}"


def _amount(event: PhaseEvent) -> str:
    if not event.done:
        return ""
    if event.unit == "B":
        text = format_bytes(event.done)
        return f"{text} of {format_bytes(event.total)}" if event.total and event.done < event.total else text
    text = str(event.done)
    if event.total and event.done < event.total:
        text += f" of {event.total}"
    return f"{text} {event.unit}".rstrip()


def format_bytes(num_bytes: int) -> str:
    """``num_bytes`` in the largest binary unit that keeps it at 1 or more: ``5.2 MiB``."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    value = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def byte_reporter() -> Callable[[str, int, int], None]:
    """A ``(phase, done_bytes, total_bytes)`` callback, the form the model loader reports in, as phase events.

    A phase begins with its first call and ends with ``done_bytes == total_bytes``.
    """
    running: dict[str, float] = {}

    def report(name: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if name not in running:
            running[name] = now
            emit(PhaseEvent(name, "begin", total=total_bytes, unit="B"))
        seconds = now - running[name]
        if done_bytes >= total_bytes:
            del running[name]
            emit(PhaseEvent(name, "end", done_bytes, total_bytes, "B", seconds))
        else:
            emit(PhaseEvent(name, "advance", done_bytes, total_bytes, "B", seconds))

    return report
