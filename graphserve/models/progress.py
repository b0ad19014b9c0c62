"""How long work in this package reports that it advances.

A reporter is called as ``progress(phase, done_bytes, total_bytes)`` from the thread that does the work, with
``done_bytes`` growing from 0 to ``total_bytes``; a phase ends with ``done_bytes == total_bytes``.
"""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def no_progress(phase: str, done_bytes: int, total_bytes: int) -> None:
    """The reporter that says nothing."""
