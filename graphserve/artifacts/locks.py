"""One builder at a time: a lock between processes that ends with its holder, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_SILENT_S = 2.0  # a wait that takes longer is said


@contextlib.contextmanager
def process_lock(path: Path, timeout_s: float, what: str) -> Iterator[None]:
    """Hold the lock file while the body runs.

    The kernel drops the lock when its holder ends, so a killed process blocks nobody. If another process holds it for
    ``timeout_s``, or the file system has no locks or cannot be written, the body runs without it: the work is then done
    twice, which is slow and not wrong.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, descriptor)
            _acquire(descriptor, timeout_s, what)
        except OSError as error:
            logger.debug("no lock for %s: %s", what, error)
        yield


def _acquire(descriptor: int, timeout_s: float, what: str) -> None:
    begin = time.monotonic()
    is_said = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited_s = time.monotonic() - begin
            if waited_s >= timeout_s:
                logger.warning("another process has been making %s for %.0f s: it is made here too", what, timeout_s)
                return
            if waited_s >= _SILENT_S and not is_said:
                logger.warning("waiting for another process that is making %s", what)
                is_said = True
            time.sleep(_POLL_S)
