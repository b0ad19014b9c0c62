"""Online use inside one process: an engine in its own thread, one async stream a request."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from types import TracebackType
from typing import Any

from graphserve.config import EngineConfig
from graphserve.engine.engine_core import EngineCoreStats
from graphserve.engine.input_processor import ProcessedInput, Prompt
from graphserve.engine.llm_engine import LLMEngine
from graphserve.errors import EngineDeadError, GraphserveError, RequestError
from graphserve.outputs import RequestOutput
from graphserve.sampling_params import RequestOutputKind, SamplingParams

logger = logging.getLogger(__name__)

_Command = Callable[[LLMEngine], None]


class _Stream:
    """Outputs of one request on their way to an event loop. Filled by the engine thread, emptied by the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, is_delta: bool) -> None:
        self._loop = loop
        # A slow reader of cumulative outputs needs the latest only.
        self._outputs: deque[RequestOutput] = deque(maxlen=None if is_delta else 1)
        self._error: GraphserveError | None = None
        self._changed = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        self._outputs.append(output)
        self._wake()

    def fail(self, error: GraphserveError) -> None:
        self._error = error
        self._wake()

    async def get(self) -> RequestOutput:
        while not self._outputs and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._outputs:
            return self._outputs.popleft()
        assert self._error is not None
        raise self._error

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.debug("an output came after its event loop was closed")


class AsyncLLM:
    """A loaded model for many concurrent callers.

    The engine runs in a thread of its own. One request's failure ends that request; if the engine itself stops, every
    caller gets :class:`EngineDeadError`.

    Args:
        model: local folder, hub id, or ``"demo"``.
        options: any field of :class:`~graphserve.config.EngineConfig`.

    Loading happens in the constructor and blocks; make it before the event loop serves others.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        self._start(LLMEngine.from_config(EngineConfig.from_kwargs(model=model, **options)))

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> AsyncLLM:
        """Use an engine that exists already and that nobody else steps; :meth:`close` closes it."""
        llm = cls.__new__(cls)
        llm._start(engine)
        return llm

    def _start(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._streams_lock = threading.Lock()
        self._calls: set[Future[None]] = set()  # of the engine thread's work that somebody awaits
        self._dead: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="graphserve engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    @property
    def engine(self) -> LLMEngine:
        """The engine underneath: read its attributes, but leave adding and stepping to this object."""
        return self._engine

    @property
    def is_running(self) -> bool:
        """Whether requests are taken."""
        return self._dead is None

    def stats(self) -> EngineCoreStats:
        """Counters and gauges, read while the engine runs: values may belong to neighbouring steps."""
        if self._dead is not None:
            raise self._dead
        return self._engine.stats()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt; yields as ``sampling_params.output_kind`` wants it, the last output is ``finished``.

        Leaving the loop early, closing the generator or cancelling the task aborts the request. With cumulative
        outputs a slow reader gets the latest state and skips what lies between.

        Raises:
            RequestError: the request cannot be served, or failed while it ran.
            EngineDeadError: the engine has stopped.
        """
        if self._dead is not None:
            raise self._dead
        request_id = uuid.uuid4().hex if request_id is None else request_id
        params = self._engine.default_sampling_params() if sampling_params is None else sampling_params
        params = self._engine.input_processor.with_seed(params)  # drawn here, in the order of the calls
        processed = await asyncio.to_thread(self._engine.input_processor.process, request_id, prompt, params)
        stream = _Stream(asyncio.get_running_loop(), params.output_kind is RequestOutputKind.DELTA)
        with self._streams_lock:
            if self._dead is not None:
                raise self._dead
            if request_id in self._streams:
                raise RequestError(f"request id {request_id!r} is in use: choose another", param="request_id")
            self._streams[request_id] = stream
        is_finished = False
        try:
            self._commands.put(lambda engine: self._add(engine, processed))
            while not is_finished:
                output = await stream.get()
                is_finished = output.finished
                if output.error is not None:
                    raise RequestError(output.error)
                yield output
        finally:
            with self._streams_lock:
                self._streams.pop(request_id, None)
            if not is_finished:
                self._commands.put(lambda engine: engine.abort(request_id))

    def abort(self, request_id: str) -> None:
        """End a request; its generator raises :class:`RequestError`. Ids that are unknown or ended are ignored."""
        with self._streams_lock:
            stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail(RequestError(f"request {request_id} was aborted"))

    async def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and KV cache back until :meth:`wake_up`. See :meth:`LLMEngine.sleep`.

        Raises:
            RequestError: a request has not ended.
            ConfigError: the level is not 1 or 2, or level 2 and the weights cannot be read again.
            EngineDeadError: the engine has stopped.
        """
        await self._in_engine(lambda engine: engine.sleep(level))

    async def wake_up(self) -> None:
        """Take memory and weights back. See :meth:`LLMEngine.wake_up`.

        Raises:
            DeviceError: the device has not enough free memory now; the engine sleeps on.
            CheckpointError: after level 2, the checkpoint cannot be read any more; the engine sleeps on.
            EngineDeadError: the engine has stopped.
        """
        await self._in_engine(lambda engine: engine.wake_up())

    async def is_sleeping(self) -> bool:
        """Whether the model sleeps; requests are then refused."""
        return self._engine.is_sleeping()

    async def _in_engine(self, command: _Command) -> None:
        """Do something in the engine's thread, between two steps; its errors are the caller's and not the engine's."""
        done: Future[None] = Future()

        def run(engine: LLMEngine) -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                command(engine)
            except GraphserveError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._streams_lock:
            if self._dead is not None:
                raise self._dead
            self._calls.add(done)
        try:
            self._commands.put(run)
            await asyncio.wrap_future(done)
        finally:
            with self._streams_lock:
                self._calls.discard(done)

    def close(self) -> None:
        """Stop the thread and give all memory back. Running requests get :class:`EngineDeadError`."""
        self._commands.put(None)
        self._thread.join()

    def _add(self, engine: LLMEngine, processed: ProcessedInput) -> None:
        try:
            engine.add_request(processed.request_id, processed)
        except RequestError as error:
            self._fail(processed.request_id, error)

    def _run(self) -> None:
        """The engine thread."""
        death = EngineDeadError("the engine is closed: make a new one")
        try:
            while self._take_commands():
                for output in self._engine.step():
                    with self._streams_lock:
                        stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output)
        except Exception as error:  # whatever it is, the callers must hear of it
            logger.exception("the engine thread stopped")
            death = EngineDeadError(f"the engine has stopped: {error}")
            death.__cause__ = error
        with self._streams_lock:
            self._dead = death
            streams, calls = list(self._streams.values()), list(self._calls)
        for stream in streams:
            stream.fail(death)
        for call in calls:
            with suppress(InvalidStateError):  # it has ended, or nobody waits any more
                call.set_exception(death)
        self._engine.close()

    def _take_commands(self) -> bool:
        """Carry out what was asked for; waits while there is nothing to step. False: stop."""
        while not self._commands.empty() or not self._engine.has_unfinished_requests():
            command = self._commands.get()
            if command is None:
                return False
            command(self._engine)
        return True

    def _fail(self, request_id: str, error: GraphserveError) -> None:
        with self._streams_lock:
            stream = self._streams.get(request_id)
        if stream is not None:
            stream.fail(error)
