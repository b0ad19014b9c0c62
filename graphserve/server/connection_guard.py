"""Deadlines for a connection's idle and header phases, which aiohttp leaves open.

aiohttp closes an idle keep-alive connection, but one that sends half a header, or nothing at all, would stay for as
long as its keep-alive lasts. :class:`GuardedProtocol` sits between the transport and aiohttp's protocol and sees only
bytes: a connection must complete a request's header within ``header_timeout_s`` of connecting or of the first byte of
its next request. The application tells the guard when a header is complete (a request started).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web


class ConnectionGuards:
    """The guards of all open connections of one server, by transport."""

    def __init__(self, protocol_factory: Callable[[], asyncio.Protocol], header_timeout_s: float) -> None:
        self._protocol_factory = protocol_factory
        self._header_timeout_s = header_timeout_s
        self._guards: dict[asyncio.BaseTransport, GuardedProtocol] = {}

    def __call__(self) -> GuardedProtocol:
        """A protocol for one new connection (a protocol factory for ``loop.create_server``)."""
        return GuardedProtocol(self._protocol_factory(), self._guards, self._header_timeout_s)

    def __len__(self) -> int:
        return len(self._guards)

    def request_started(self, transport: asyncio.BaseTransport | None) -> None:
        """The header of a request on this connection is complete."""
        if transport is not None and (guard := self._guards.get(transport)):
            guard.request_started()

    def request_finished(self, transport: asyncio.BaseTransport | None) -> None:
        """The answer is written; the next byte begins another header."""
        if transport is not None and (guard := self._guards.get(transport)):
            guard.request_finished()


class GuardedProtocol(asyncio.Protocol):
    """Forwards everything to ``inner``; aborts the transport when a header takes too long."""

    def __init__(
        self, inner: asyncio.Protocol, guards: dict[asyncio.BaseTransport, GuardedProtocol], header_timeout_s: float
    ) -> None:
        self._inner, self._guards, self._header_timeout_s = inner, guards, header_timeout_s
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._num_requests = 0  # running on this connection; more than one when a client pipelines

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._guards[transport] = self
        self._start_deadline()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self._num_requests == 0:
            self._start_deadline()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_deadline()
        if self._transport is not None:
            self._guards.pop(self._transport, None)
        self._inner.connection_lost(exc)

    def request_started(self) -> None:
        self._num_requests += 1
        self._stop_deadline()

    def request_finished(self) -> None:
        self._num_requests -= 1

    def _start_deadline(self) -> None:
        loop: Any = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._header_timeout_s, self._expire)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        if self._transport is not None:
            self._transport.abort()


GUARDS: web.AppKey[ConnectionGuards] = web.AppKey("guards", ConnectionGuards)
