"""What the handlers of one server share: options, engine, renderer, metrics, and whether requests are admitted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from aiohttp import web

from graphserve.engine.client import EngineClient
from graphserve.server.errors import ApiError, overloaded, unavailable
from graphserve.server.metrics import ServerMetrics
from graphserve.server.options import ServerOptions

if TYPE_CHECKING:
    from graphserve.server.renderer import Renderer


class ServerState:
    """One server's shared state; lives on its event loop."""

    def __init__(self, options: ServerOptions, client: EngineClient) -> None:
        self.options, self.client = options, client
        self.metrics = ServerMetrics(client)
        self.renderer: Renderer | None = None
        self.is_draining = False
        self.created = int(time.time())
        self.num_sequences = 0  # admitted and not yet ended

    @property
    def is_ready(self) -> bool:
        """Whether a request would be admitted now (but for a full queue)."""
        return self.client.is_ready and self.renderer is not None and not self.is_draining

    @property
    def model_names(self) -> Sequence[str]:
        """Names under which the model is served."""
        return self.client.info.served_model_names

    @property
    def max_sequences(self) -> int:
        """Sequences that may run or wait at once."""
        max_num_seqs = self.client.info.max_num_seqs
        queued = self.options.max_num_queued_reqs
        return max_num_seqs + (4 * max_num_seqs if queued is None else queued)

    def ready_renderer(self) -> Renderer:
        """The renderer, when requests are admitted.

        Raises:
            ApiError: 503 that says why not.
        """
        if self.is_draining:
            raise unavailable("the server is shutting down and takes no new requests")
        if self.renderer is None or self.client.state == "starting":
            raise unavailable("the model is still loading", retry_after_s=2)
        if not self.client.is_ready:
            raise unavailable(f"the engine is {self.client.state}", retry_after_s=2)
        return self.renderer

    def served_name(self, requested: str | None) -> str:
        """The model name to answer with.

        Raises:
            ApiError: 404 for a model that is not served.
        """
        names = self.model_names
        if requested is None or requested in names:
            return requested or names[0]
        message = f"model {requested[:128]!r} is not served here; served: {', '.join(names)}"
        raise ApiError(404, message, param="model", code="model_not_found")

    @contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        """Count sequences as admitted for the body of the ``with``.

        Raises:
            ApiError: 429 when they would overfill the queue.
        """
        limit = self.max_sequences
        if self.num_sequences + num_sequences > limit:
            self.metrics.count_rejection("queue_full")
            raise overloaded(self.num_sequences, limit)
        self.num_sequences += num_sequences
        try:
            yield
        finally:
            self.num_sequences -= num_sequences


STATE: web.AppKey[ServerState] = web.AppKey("state", ServerState)

# aiohttp 3.14 warns about other keys than its RequestKey; before, it had none and took any.
_RequestKey: Any = getattr(web, "RequestKey", web.AppKey)
REQUEST_ID = _RequestKey("request_id", str)
EVENTS = _RequestKey("events", object)  # the request's EventStream
