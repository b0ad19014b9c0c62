"""Server-sent events: the framing of a streamed answer, and a writer that a slow reader cannot hold for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from graphserve.server.state import EVENTS, REQUEST_ID, STATE

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


class SlowClientError(ConnectionError):
    """The client did not take the stream's bytes within the write timeout."""


def frame(payload: Any) -> bytes:
    """One event: ``data: <json>`` and a blank line. JSON has no raw newline, so one data line suffices."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


class EventStream:
    """One streamed response. The status line goes out with the first event, so an early error can still be a 4xx."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._write_timeout_s = request.app[STATE].options.write_timeout
        request[EVENTS] = self
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx would otherwise hold events back
                "X-Request-Id": request[REQUEST_ID],
            }
        )

    @property
    def is_started(self) -> bool:
        """Whether the status line is already sent."""
        return self.response.prepared

    async def send(self, *payloads: Any) -> None:
        """Write one event for each payload, in a single write.

        Raises:
            SlowClientError: the client took nothing for ``write_timeout_s`` seconds; its connection is cut.
        """
        await self._write(b"".join(map(frame, payloads)))

    async def done(self) -> None:
        """Write the closing ``[DONE]`` and end the response."""
        await self._write(DONE)
        await self.response.write_eof()

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                if not self.response.prepared:
                    await self.response.prepare(self._request)
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise SlowClientError(f"the client read nothing for {self._write_timeout_s:g} s") from None
