"""The API process's side of the engine process: start, watch, restart, and one output stream a request.

Invariant: every request that was submitted either ends with a finish reason, ends with an error, or was aborted;
none waits for ever. When the engine process goes away, for whatever reason, all running streams get
:class:`EngineDeadError` at once and the process is started again with growing pauses, a bounded number of times.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from graphserve import errors, progress
from graphserve.engine.child import EngineChild
from graphserve.engine.messages import (
    HEADER,
    AbortRequests,
    AddRequest,
    EngineFailed,
    EngineInfo,
    EngineReady,
    EngineStats,
    FromEngine,
    Progressed,
    RequestEnded,
    Shutdown,
    StartEngine,
    StepOutputs,
    TokenizerSource,
    encode_frame,
    frame_length,
)
from graphserve.engine.request_stream import RequestFailedError, RequestStream
from graphserve.errors import EngineDeadError, GraphserveError, RequestError
from graphserve.progress import PhaseEvent

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "graphserve.engine.process")
RESTART_PAUSES_S = (0.5, 2.0, 8.0)  # one restart each; then the engine counts as broken
STABLE_AFTER_S = 60.0  # an engine that ran this long has earned a fresh set of restarts
STOP_TIMEOUT_S = 10.0

State = Literal["starting", "ready", "restarting", "failed", "stopped"]


class EngineClient:
    """Owns the engine process. All methods belong to one event loop.

    Args:
        config: fields of ``EngineConfig`` as plain data.
        command: how to start the process (see :class:`~graphserve.engine.child.EngineChild`).
        restart_pauses_s: pause before each restart; their number bounds the restarts.
    """

    def __init__(
        self,
        config: dict[str, Any],
        command: Sequence[str] = ENGINE_COMMAND,
        restart_pauses_s: Sequence[float] = RESTART_PAUSES_S,
    ) -> None:
        self._config, self._command, self._restart_pauses_s = config, tuple(command), tuple(restart_pauses_s)
        self.state: State = "starting"
        self.stats = EngineStats()
        self._stats_before = EngineStats()  # counters of the processes that came before this one
        self.num_restarts = 0
        self.num_submitted = 0  # engine requests, over all processes
        self._info: EngineInfo | None = None
        self._streams: dict[str, RequestStream] = {}
        self._phases: dict[str, tuple[PhaseEvent, float]] = {}  # phases that have not ended: last event, and when
        self._child: EngineChild | None = None
        self._spawned: socket.socket | None = None  # to a process that spawn() started and nobody listens to yet
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @property
    def info(self) -> EngineInfo:
        """Facts about the loaded model; raises :class:`EngineDeadError` before the first start has finished."""
        if self._info is None:
            raise EngineDeadError("the engine has not started yet")
        return self._info

    @property
    def has_info(self) -> bool:
        return self._info is not None

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"

    @property
    def process_id(self) -> int | None:
        """Operating-system id of the running engine process."""
        return self._child.pid if self._child is not None else None

    @property
    def total_stats(self) -> EngineStats:
        """Counters over all processes so far, without gauges."""
        return self._stats_before.plus_counters(self.stats)

    @property
    def num_requests(self) -> int:
        """Requests submitted and not yet ended."""
        return len(self._streams)

    def spawn(self) -> None:
        """Begin :meth:`start` outside of an event loop: the process loads while this one still imports.

        Raises:
            EngineDeadError: the process cannot be started.
        """
        self._spawned = self._new_child()

    async def start(self, on_tokenizer: Callable[[TokenizerSource], None] = lambda source: None) -> EngineInfo:
        """Start the process, unless :meth:`spawn` did, and wait until it takes requests.

        Args:
            on_tokenizer: told where this process has its tokenizer from, while the engine loads.

        Raises:
            GraphserveError: the error that kept it from starting, of its original class.
        """
        info = await self._launch(on_tokenizer)
        self._watcher = asyncio.create_task(self._watch(), name="engine watcher")
        return info

    async def wait_until_gone(self) -> None:
        """Return when the engine will not come back: shut down, or failed after its last restart."""
        if self._watcher is not None:
            await asyncio.wait([self._watcher])

    def submit(self, requests: Sequence[AddRequest]) -> RequestStream:
        """Begin requests; iterate the stream for their outputs, and call :meth:`abort` with it in the end.

        Raises:
            EngineDeadError: the engine is not ready.
        """
        if not self.is_ready:
            raise EngineDeadError(f"the engine is {self.state}")
        stream = RequestStream(requests)
        for request in requests:
            assert request.request_id not in self._streams, f"request id {request.request_id} is in use"
            self._streams[request.request_id] = stream
            self._send(request)
        self.num_submitted += len(requests)
        return stream

    def abort(self, stream: RequestStream) -> None:
        """End what still runs of a stream."""
        running = [request_id for request_id in stream.request_ids if self._streams.pop(request_id, None) is not None]
        if running and self.is_ready:
            self._send(AbortRequests(running))

    async def shutdown(self, is_forced: bool = False) -> None:
        """Stop the process: politely, or by a kill when ``is_forced`` or it does not go within 10 s."""
        self.state = "stopped"
        if self._child is not None:
            if not is_forced:
                self._send(Shutdown())
            await self._end(self._child, 0.0 if is_forced else STOP_TIMEOUT_S)
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        self._close_socket()
        self._fail_streams("the server is shutting down")

    def _new_child(self) -> socket.socket:
        """Start a process that loads the configuration; returns our end of the connection."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._child = EngineChild(self._command, theirs.fileno())
            ours.sendall(encode_frame(StartEngine(self._config)))
        except OSError as error:
            ours.close()
            raise EngineDeadError(f"the engine process cannot be started: {error}") from error
        return ours

    async def _launch(self, on_tokenizer: Callable[[TokenizerSource], None] = lambda source: None) -> EngineInfo:
        """Play the handshake with a new process: configuration → tokenizer and phases → ready."""
        sock, self._spawned = self._spawned or self._new_child(), None
        self._reader, self._writer = await asyncio.open_connection(sock=sock)
        while True:
            match await self._receive():
                case Progressed(event=event):
                    self._replay(event)
                case TokenizerSource() as source:
                    on_tokenizer(source)
                case EngineReady(info=info, stats=stats):
                    self._info, self.stats, self.state = info, stats, "ready"
                    return info
                case EngineFailed() as failed:
                    await self._reap()
                    logger.debug("engine process: %s", failed.traceback)
                    raise _original_error(failed)
                case None:
                    raise EngineDeadError(f"the engine process ended while it loaded ({await self._reap()})")

    async def _watch(self) -> None:
        """Serve the running process; when it is gone, restart it."""
        pauses = list(self._restart_pauses_s)
        while True:
            began = time.monotonic()
            cause = await self._read_outputs()
            if self.state == "stopped":
                return
            self.state = "restarting"
            how = await self._reap()
            cause = cause or how
            logger.error("the engine process ended (%s); %d requests failed", cause, len(self._streams))
            self._fail_streams(f"the engine process ended ({cause})")
            if time.monotonic() - began > STABLE_AFTER_S:
                pauses = list(self._restart_pauses_s)
            if not await self._restart(pauses):
                self.state = "failed"
                return

    async def _restart(self, pauses: list[float]) -> bool:
        """Try until one start succeeds or ``pauses`` (shortened in place) is used up."""
        while pauses:
            pause_s = pauses.pop(0)
            logger.warning("restarting the engine in %g s (%d tries left after this)", pause_s, len(pauses))
            await asyncio.sleep(pause_s)
            self.num_restarts += 1
            try:
                await self._launch()
            except GraphserveError as error:
                logger.error("the engine did not restart: %s", error)
            else:
                logger.info("the engine is ready again")
                return True
        return False

    async def _read_outputs(self) -> str | None:
        """Hand messages to their streams until the process goes; returns its own word on the cause, if any."""
        while True:
            match await self._receive():
                case StepOutputs(deltas=deltas, stats=stats):
                    self.stats = stats
                    for delta in deltas:
                        if (stream := self._streams.get(delta.request_id)) is not None and stream.push(delta):
                            del self._streams[delta.request_id]
                case RequestEnded() as ended:
                    if (stream := self._streams.pop(ended.request_id, None)) is not None:
                        if ended.is_client_error:
                            stream.fail(RequestError(ended.message, ended.param))
                        else:
                            stream.fail(RequestFailedError(ended.message))
                case Progressed(event=event):
                    self._replay(event)
                case EngineFailed() as failed:
                    logger.error("engine process: %s", failed.traceback)
                    return f"{failed.kind}: {failed.message}"
                case None:
                    return None

    async def _receive(self) -> FromEngine | None:
        assert self._reader is not None
        try:
            header = await self._reader.readexactly(HEADER.size)
            return self._decoder.decode(await self._reader.readexactly(frame_length(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def _send(self, message: object) -> None:
        # Requests are small next to the socket's buffer, and asyncio keeps what does not fit: nothing to await.
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    def _fail_streams(self, reason: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineDeadError(reason))
        self._stats_before = self.total_stats
        self.stats = EngineStats()

    async def _reap(self) -> str:
        """Make sure that the process is gone; returns how it ended."""
        assert self._child is not None
        self._close_socket()
        await self._end(self._child, STOP_TIMEOUT_S)
        return self._child.how_it_ended

    async def _end(self, child: EngineChild, patience_s: float) -> None:
        """Wait for a process that should end, then kill it."""
        if not await child.wait(patience_s):
            child.kill()
            await child.wait(STOP_TIMEOUT_S)
        self._fail_phases()

    def _replay(self, event: PhaseEvent) -> None:
        """Report a phase of the process as one of this process."""
        if event.state in ("begin", "advance"):
            self._phases[event.name] = (event, time.monotonic())
        else:
            self._phases.pop(event.name, None)
        progress.emit(event)

    def _fail_phases(self) -> None:
        """Report the end of what a process that is gone was doing."""
        phases, self._phases = self._phases, {}
        for event, at in reversed(phases.values()):  # the innermost first
            seconds = event.seconds + time.monotonic() - at
            note = "the engine process ended"
            progress.emit(msgspec.structs.replace(event, state="fail", seconds=seconds, note=note))

    def _close_socket(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._spawned is not None:
            self._spawned.close()


def _original_error(failed: EngineFailed) -> GraphserveError:
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, GraphserveError):
        error = kind(failed.message)
    else:
        error = EngineDeadError(f"the engine could not start: {failed.kind}: {failed.message}")
    error.add_note(failed.traceback)
    return error
