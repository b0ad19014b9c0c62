"""The engine process as its parent holds it: with all that it starts, and the temporary files of both."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


class EngineChild:
    """One engine process.

    Invariant: once :meth:`wait` has said that it ended, the compilers that it started are killed and its temporary
    files deleted, however it ended. For that it leads a session of its own, whose processes are killed as one group (a
    terminal's Ctrl-C does not reach them), and its ``TMPDIR`` is a folder of its own. Where the parent is killed, the
    engine process cleans up itself (``engine/process.py``).

    Args:
        command: the program; the number of its socket and the folder for its temporary files are appended.
        fd: its end of the socketpair.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], fd: int) -> None:
        self._is_gone = False
        self._scratch = _make_scratch()
        environment = _environment()
        if self._scratch:
            environment["TMPDIR"] = self._scratch
        try:
            # stdout is for answers of this program only; whatever the engine prints goes to stderr.
            self._process = subprocess.Popen(
                [*command, str(fd), self._scratch],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env=environment,
                start_new_session=True,
            )
        except OSError:
            self._remove_scratch()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def how_it_ended(self) -> str:
        """``exit status 1``, or the signal that killed it."""
        status = self._process.returncode
        if status is None or status >= 0:
            return f"exit status {status}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return f"killed by {name}" + (", mostly for a lack of memory" if -status == signal.SIGKILL else "")

    def kill(self) -> None:
        """End it at once; :meth:`wait` for the end."""
        self._process.kill()

    async def wait(self, timeout_s: float) -> bool:
        """Whether it ended within ``timeout_s``; nothing of it is left then."""
        return await asyncio.to_thread(self._wait, timeout_s)

    def _wait(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if not self._is_gone:
            self._is_gone = True
            # At once and once only: the kernel gives the number to no other process while one of the group lives.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._remove_scratch()
        return True

    def _remove_scratch(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _make_scratch() -> str:
    """A new folder; empty where nothing can be written, which a start with a full store does not need."""
    try:
        return tempfile.mkdtemp(prefix="graphserve-engine-")
    except OSError:
        return ""


def _environment() -> dict[str, str]:
    """This process's environment, in which the engine process imports the same graphserve from any folder."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root}
