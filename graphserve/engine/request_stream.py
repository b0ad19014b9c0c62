"""The API process's view of running requests: their outputs, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from graphserve.engine.messages import AddRequest, OutputDelta
from graphserve.errors import GraphserveError


class RequestFailedError(GraphserveError):
    """One request failed inside the engine through no fault of its own; the engine and other requests go on."""


class RequestStream:
    """The outputs of one or several requests, those of a choice in order.

    Deltas that wait for a slow reader are merged, so no reader can make them pile up.
    """

    def __init__(self, requests: Sequence[AddRequest]) -> None:
        self.request_ids = [request.request_id for request in requests]
        self._num_running = {request.request_id: request.params.n for request in requests}
        self._pending: dict[tuple[str, int], OutputDelta] = {}
        self._error: GraphserveError | None = None
        self._changed = asyncio.Event()

    def push(self, delta: OutputDelta) -> bool:
        """Take one delta; True when its request has ended with it."""
        if delta.finish_reason is not None:
            self._num_running[delta.request_id] -= 1
        key = (delta.request_id, delta.index)
        if (waiting := self._pending.get(key)) is not None:
            waiting.merge(delta)
        else:
            self._pending[key] = delta
        self._changed.set()
        return self._num_running[delta.request_id] == 0

    def fail(self, error: GraphserveError) -> None:
        """End the stream with ``error`` after the deltas that wait; the first error stays."""
        self._error = self._error or error
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[list[OutputDelta]]:
        """Yield the deltas that arrived since the last turn, at most one a choice.

        Raises:
            RequestError: a request is invalid.
            RequestFailedError: one failed inside the engine.
            EngineDeadError: the engine process is gone.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            deltas, self._pending = list(self._pending.values()), {}
            if deltas:
                yield deltas
            if self._error is not None:
                raise self._error
            if not any(self._num_running.values()):
                return
