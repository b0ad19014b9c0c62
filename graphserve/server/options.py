"""Options of the HTTP server."""

from __future__ import annotations

import msgspec

from graphserve.errors import ConfigError


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``graphserve serve`` besides the engine's.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        api_key: key that clients must send; without one none is needed.
        max_num_queued_reqs: sequences that may wait besides those that can run, None for four times max_num_seqs.
        drain_timeout: seconds that running requests may take after SIGTERM.
        header_timeout: seconds for a request's header to arrive.
        body_timeout: seconds for a request's body to arrive.
        write_timeout: seconds without the client taking any byte of a stream, before it is cut off.
        keep_alive_timeout: seconds that an idle connection stays open.
        max_body_bytes: largest request body.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: list[str] = msgspec.field(default_factory=list)
    max_num_queued_reqs: int | None = None
    drain_timeout: float = 30.0
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    keep_alive_timeout: float = 75.0
    max_body_bytes: int = 8 * 2**20

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is not allowed: it must be in [0, 65535]")
        if any(not key for key in self.api_key):
            raise ConfigError("api_key is empty: give a key, or leave api_key out to need none")
        if self.max_num_queued_reqs is not None and self.max_num_queued_reqs < 0:
            raise ConfigError(f"max_num_queued_reqs={self.max_num_queued_reqs} is not allowed: it must be >= 0")
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes={self.max_body_bytes} is not allowed: it must be >= 1")
        if self.drain_timeout < 0:
            raise ConfigError(f"drain_timeout={self.drain_timeout} is not allowed: it must be >= 0 seconds")
        for name in ("header_timeout", "body_timeout", "write_timeout", "keep_alive_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not allowed: it must be > 0 seconds")
