"""Building C++ libraries beside a model that runs already."""

from __future__ import annotations

import logging
import threading
import time

from graphserve.artifacts import ArtifactStore
from graphserve.errors import GraphserveError
from graphserve.kernels.cpu import CppKernel, compile_missing

logger = logging.getLogger(__name__)


_NICENESS = 15  # with equal rights, compilers on every core made the first answer of a tiered start take 3.6 s


class BackgroundBuild:
    """A thread that fills the store with the libraries of some kernels.

    Invariant: once ``is_done``, either every library is in the store or ``error`` says why not.
    """

    def __init__(self, kernels: list[CppKernel], store: ArtifactStore) -> None:
        self.error: GraphserveError | None = None
        self._kernels, self._store = kernels, store
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
            compile_missing(self._kernels, self._store, is_stopped=self._is_stopped.is_set, niceness=_NICENESS)
        except GraphserveError as error:
            self.error = error
        else:
            logger.info("kernels built in the background in %.1f s", time.monotonic() - begin)
