"""``/health*``, ``/version`` and ``/metrics``.

Live: this process answers. Ready: a request would be admitted now. A restarting engine is live and not ready.
"""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from graphserve import __version__
from graphserve.server.bodies import json_response
from graphserve.server.errors import error_response, unavailable
from graphserve.server.state import STATE


async def live(request: web.Request) -> web.Response:
    """200 as long as the process can answer at all."""
    return json_response({"status": "live"})


async def ready(request: web.Request) -> web.Response:
    """200 when requests are admitted, else 503 with the reason."""
    state = request.app[STATE]
    if state.is_ready:
        return json_response({"status": "ready"})
    reason = "draining" if state.is_draining else state.client.state
    return error_response(unavailable(f"not ready: {reason}"))


async def version(request: web.Request) -> web.Response:
    """The package's version."""
    return json_response({"version": __version__})


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format."""
    body = request.app[STATE].metrics.exposition()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
