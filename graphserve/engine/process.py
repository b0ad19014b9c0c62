"""The engine process: an :class:`LLMEngine` behind one socket.

Started by ``engine/child.py`` with the number of an inherited socket and the folder of its temporary files. The main
thread steps the engine; a reader thread takes messages off the socket, so the end of the parent is noticed at once, in
the middle of a load, a compilation or a step: the process then ends with its compilers, and nothing is left behind.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import msgspec

from graphserve import progress
from graphserve.artifacts.cache_dir import remove_own_folder
from graphserve.engine.messages import (
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineInfo,
    EngineReady,
    EngineStats,
    MessageSocket,
    OutputDelta,
    Progressed,
    RequestEnded,
    Shutdown,
    StartEngine,
    StepOutputs,
    ToEngine,
    TokenizerSource,
)
from graphserve.errors import RequestError
from graphserve.processors import use_one_blas_thread

logger = logging.getLogger(__name__)

_STATS_INTERVAL_S = 0.25  # while long prompts are computed, steps bring no output that the stats could ride on


class SteppedEngine(Protocol):
    """What the loop needs of an engine; :class:`~graphserve.engine.served_engine.ServedEngine` is one."""

    info: EngineInfo

    def add(self, request: AddRequest) -> None:
        """Queue a request; :class:`RequestError` when it is invalid."""

    def abort(self, request_ids: list[str]) -> None: ...

    def step(self) -> tuple[list[OutputDelta], list[RequestEnded]]:
        """Run one step; what it added, and requests that failed on their own."""

    def has_unfinished_requests(self) -> bool: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


# Makes the engine of a configuration; has to call its second argument before it returns.
MakeEngine = Callable[[dict[str, Any], Callable[[TokenizerSource], None]], SteppedEngine]


class EngineLoop:
    """Messages in, steps, messages out, until a :class:`Shutdown`.

    Args:
        scratch: the folder of this process's temporary files, empty if it has none of its own.
    """

    def __init__(self, connection: MessageSocket[ToEngine], scratch: str) -> None:
        self._connection, self._scratch = connection, scratch
        self._stats_sent_at = 0.0
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="engine reader", daemon=True).start()

    def run(self, make_engine: MakeEngine) -> None:
        """Take the configuration, make the engine and serve it."""
        first = self._inbox.get()
        assert isinstance(first, StartEngine), f"the first message was {type(first).__name__}"
        progress.set_sink(lambda event: self._connection.send(Progressed(event)))
        engine = make_engine(first.config, self._connection.send)
        self._connection.send(EngineReady(engine.info, engine.stats()))
        try:
            while self._take_messages(engine):
                if engine.has_unfinished_requests():
                    self._step(engine)
        finally:
            engine.close()

    def _step(self, engine: SteppedEngine) -> None:
        deltas, ended = engine.step()
        for failure in ended:
            self._connection.send(failure)
        now = time.monotonic()
        if deltas or ended or now - self._stats_sent_at > _STATS_INTERVAL_S:
            self._stats_sent_at = now
            self._connection.send(StepOutputs(deltas, engine.stats()))

    def _take_messages(self, engine: SteppedEngine) -> bool:
        """Handle what has arrived; waits for a message when there is nothing to step. False: shut down."""
        is_idle = not engine.has_unfinished_requests()
        while is_idle or not self._inbox.empty():
            match self._inbox.get():
                case AddRequest() as request:
                    try:
                        engine.add(request)
                        is_idle = False
                    except RequestError as error:
                        self._connection.send(RequestEnded(request.request_id, str(error), error.param, True))
                case AbortRequests(request_ids=request_ids):
                    engine.abort(request_ids)
                    is_idle = not engine.has_unfinished_requests()
                    self._connection.send(StepOutputs([], engine.stats()))
                case Shutdown():
                    return False
        return True

    def _read(self) -> None:
        try:
            while (message := self._connection.receive()) is not None:
                self._inbox.put(message)
        finally:
            _end_orphaned(self._scratch)


def _end_orphaned(scratch: str) -> NoReturn:
    """The parent is gone: nobody is left to answer to, nor to clean up."""
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # compilers, and this process
    os._exit(1)


def run_engine_process(arguments: Sequence[str], make_engine: MakeEngine) -> int:
    """Serve the engine; returns the exit status.

    The parent alone decides when to stop: a service manager's SIGTERM reaches this process too, but the parent drains
    first.

    Args:
        arguments: of the command line: number of the inherited socket, folder for temporary files (may be empty).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _log_to_stderr()
    fd, scratch = arguments
    sock = socket.socket(fileno=int(fd))
    sock.set_inheritable(False)  # a compiler started from here must not keep the connection open
    connection: MessageSocket[ToEngine] = MessageSocket(sock, msgspec.msgpack.Decoder(ToEngine))
    try:
        EngineLoop(connection, scratch).run(make_engine)
    except Exception as error:
        connection.send(EngineFailed(type(error).__name__, str(error), traceback.format_exc()))
        return 1
    return 0


def _log_to_stderr() -> None:
    """As the server's own process does. A line first clears what a progress bar may have left in its place."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    logging.basicConfig(
        level=os.environ.get("GRAPHSERVE_LOG_LEVEL", "INFO").upper(),
        format=f"{clear}%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def main() -> None:
    """Entry of ``python -m graphserve.engine.process FD FOLDER``."""
    use_one_blas_thread()
    from graphserve.engine.served_engine import load_engine

    status = run_engine_process(sys.argv[1:], load_engine)
    sys.stderr.flush()
    remove_own_folder()
    os._exit(status)  # the engine is closed; Python's own teardown with torch loaded would take seconds more


if __name__ == "__main__":
    main()
