"""Building kernels beside a model that runs already."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from graphserve.errors import CompileError, GraphserveError

logger = logging.getLogger(__name__)

# A third of the processor time of other work. With equal rights, compilers on both cores made the first answer of a
# tiered start take 3.6 s; at 15, a thirtieth, two busy processes made the build take 113 s instead of 16 s.
NICENESS = 5

Built = TypeVar("Built", covariant=True)


class Build(Protocol[Built]):
    """Fills a store with kernels; ``is_stopped`` is asked before each of them."""

    def __call__(self, *, is_stopped: Callable[[], bool], niceness: int) -> Built: ...


class BackgroundBuild(Generic[Built]):
    """A thread that runs a build.

    Invariant: once ``is_done``, ``result`` is what the build returned, or ``error`` says why it did not.
    """

    def __init__(self, build: Build[Built]) -> None:
        self.result: Built | None = None
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
            self.result = self._build(is_stopped=self._is_stopped.is_set, niceness=NICENESS)
        except GraphserveError as error:
            self.error = error
        except Exception as error:  # whatever it is, the model that runs beside it must not suffer
            logger.debug("the build in the background failed", exc_info=True)
            self.error = CompileError(f"{type(error).__name__}: {error}")
        else:
            if not self._is_stopped.is_set():
                logger.info("kernels built in the background in %.1f s", time.monotonic() - begin)
