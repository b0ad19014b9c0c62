"""The life of a server: listen, start the engine, serve, drain, stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from typing import cast

from aiohttp import web

from graphserve.engine.client import EngineClient
from graphserve.engine.messages import EngineInfo, TokenizerSource
from graphserve.errors import ConfigError
from graphserve.models.tokenizer import Tokenizer
from graphserve.server.app import make_app
from graphserve.server.connection_guard import GUARDS, ConnectionGuards
from graphserve.server.options import ServerOptions
from graphserve.server.renderer import Renderer, make_tokenizer
from graphserve.server.state import ServerState

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 2.0  # for handlers to write their last event once the engine is gone
_DRAIN_POLL_S = 0.02


class Server:
    """One HTTP server and its engine process: :meth:`listen`, :meth:`load`, :meth:`wait_for_end`, :meth:`close`.

    Invariant: the port answers from :meth:`listen` on (live, not ready), and the engine process ends with the server.
    """

    def __init__(self, options: ServerOptions, client: EngineClient) -> None:
        self.options = options
        self.state = ServerState(options, client)
        self._app = make_app(self.state)
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            handler_cancellation=True,  # a client that leaves cancels its handler, which aborts in the engine
            keepalive_timeout=options.keep_alive_timeout,
            shutdown_timeout=_CLOSE_TIMEOUT_S,
        )
        self._listener: asyncio.Server | None = None
        self._is_closed = False

    @property
    def url(self) -> str:
        """Where the server answers, with the port that was really taken."""
        assert self._listener is not None, "the server does not listen yet"
        host, port = self._listener.sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def listen(self) -> None:
        """Bind the port, before anything slow, so that a taken port is reported at once.

        Raises:
            ConfigError: the address cannot be used; says why.
        """
        host, port = self.options.host, self.options.port
        # the guards need the runner's server, which exists only after a setup that freezes the application
        guards = ConnectionGuards(self._new_protocol, self.options.header_timeout)
        self._app[GUARDS] = guards
        await self._runner.setup()
        try:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(guards, host, port, backlog=1024)
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(_bind_message(host, port, error)) from error

    async def load(self) -> EngineInfo:
        """Start the engine and, beside its load, load this process's tokenizer; the server is ready when this returns.

        Raises:
            GraphserveError: what kept one of them from starting.
        """
        source: asyncio.Future[TokenizerSource] = asyncio.get_running_loop().create_future()
        starting = asyncio.ensure_future(self.state.client.start(source.set_result))
        try:
            info, tokenizer = await asyncio.gather(starting, _load_tokenizer(source))
        finally:
            starting.cancel()
            source.cancel()
        self.state.renderer = Renderer(tokenizer, info.vocab_size)
        return info

    async def wait_for_end(self, stop: asyncio.Event) -> bool:
        """Return when ``stop`` is set (True) or the engine is gone for good (False)."""
        waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self.state.client.wait_until_gone())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return stop.is_set()

    async def drain(self) -> int:
        """Take no new requests and wait for the running ones, at most ``drain_timeout``; returns how many were left."""
        self.state.is_draining = True
        logger.info("draining: %d sequences still run", self.state.num_sequences)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.options.drain_timeout
        while self.state.num_sequences and loop.time() < deadline and self.state.client.is_ready:
            await asyncio.sleep(_DRAIN_POLL_S)
        return self.state.num_sequences

    async def close(self, is_forced: bool = False) -> None:
        """Stop the engine (streams that still run get an error event), then the HTTP side. May be called again."""
        if self._is_closed:
            return
        self.state.is_draining = True
        await self.state.client.shutdown(is_forced)
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
        if self.state.renderer is not None:
            self.state.renderer.close()
        self._is_closed = True

    def _new_protocol(self) -> asyncio.Protocol:
        assert self._runner.server is not None
        return cast(asyncio.Protocol, self._runner.server())


async def _load_tokenizer(source: asyncio.Future[TokenizerSource]) -> Tokenizer | None:
    return await asyncio.to_thread(make_tokenizer, await source)


async def serve(options: ServerOptions, client: EngineClient, on_ready: Callable[[Server, EngineInfo], None]) -> int:
    """Run a server until a signal ends it; returns the exit status.

    SIGTERM or SIGINT: drain and exit 0. A second one: end at once, exit 1. An engine that cannot be restarted: exit 1,
    so that a service manager sees the failure.

    Raises:
        GraphserveError: the server could not start.
    """
    server = Server(options, client)
    stop, force = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: force.set() if stop.is_set() else stop.set())
    life = asyncio.ensure_future(_live(server, stop, on_ready))
    forced = asyncio.ensure_future(force.wait())
    try:
        await asyncio.wait([life, forced], return_when=asyncio.FIRST_COMPLETED)
        if not life.done():
            logger.warning("second signal: ending at once")
            life.cancel()
            await asyncio.wait([life])
            return 1
        return life.result()
    finally:
        forced.cancel()
        await server.close(is_forced=True)


async def _live(server: Server, stop: asyncio.Event, on_ready: Callable[[Server, EngineInfo], None]) -> int:
    await server.listen()
    loading = asyncio.ensure_future(server.load())
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            logger.info("stopped while loading")
            return 0
        on_ready(server, loading.result())
    finally:
        loading.cancel()
        stopping.cancel()
    if not await server.wait_for_end(stop):
        logger.error("the engine could not be restarted; the server ends")
        return 1
    if num_left := await server.drain():
        logger.warning("%d sequences did not end within %g s", num_left, server.options.drain_timeout)
    await server.close()
    return 0


def _bind_message(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: stop the other program, or give another --port (0 takes a free one)"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"host {host!r} is not an address of this machine: give 127.0.0.1, 0.0.0.0 or one of its addresses"
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has: give a --port of 1024 or above"
    return f"cannot listen on {host}:{port}: {error.strerror or error}"
