"""Building kernels beside a model that runs already."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from graphserve.errors import GraphserveError

logger = logging.getLogger(__name__)

NICENESS = 15  # with equal rights, compilers on every core made the first answer of a tiered start take 3.6 s


class Build(Protocol):
    """Fills a store with kernels; ``is_stopped`` is asked before each of them."""

    def __call__(self, *, is_stopped: Callable[[], bool], niceness: int) -> None: ...


class BackgroundBuild:
    """A thread that runs a build.

    Invariant: once ``is_done``, either everything is in the store or ``error`` says why not.
    """

    def __init__(self, build: Build) -> None:
        self.error: GraphserveError | None = None
        self._build = build
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kernel build", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Block until it is done."""
        self._thread.join()

    def stop(self) -> None:
        """Start no further compiler and wait for those that run, so that their work is kept."""
        self._is_stopped.set()
        self._thread.join()

    def _run(self) -> None:
        begin = time.monotonic()
        try:
            self._build(is_stopped=self._is_stopped.is_set, niceness=NICENESS)
        except GraphserveError as error:
            self.error = error
        else:
            logger.info("kernels built in the background in %.1f s", time.monotonic() - begin)
