"""The aiohttp application: the route table, and what surrounds every request (key, errors, metrics)."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import web

from graphserve.server import chat_completions, completions, health, models
from graphserve.server.connection_guard import GUARDS
from graphserve.server.errors import ApiError, error_response, from_http_exception
from graphserve.server.sse import EventStream, SlowClientError
from graphserve.server.state import EVENTS, REQUEST_ID, STATE, ServerState

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Digests = tuple[bytes, ...]
KEY_DIGESTS: web.AppKey[Digests] = web.AppKey("key_digests", tuple)

STATUS_CLIENT_LEFT = 499  # for the metrics only; nobody receives it


class Route(NamedTuple):
    """One endpoint. ``is_open``: answers without the API key; a route that does not say so needs it."""

    method: str
    path: str
    handler: Handler
    is_open: bool = False


ROUTES = (
    Route("POST", "/v1/completions", completions.create_completion),
    Route("POST", "/v1/chat/completions", chat_completions.create_chat_completion),
    Route("GET", "/v1/models", models.list_models),
    Route("GET", "/v1/models/{model:.+}", models.get_model),
    Route("GET", "/health", health.ready, is_open=True),
    Route("GET", "/health/live", health.live, is_open=True),
    Route("GET", "/health/ready", health.ready, is_open=True),
    Route("GET", "/version", health.version),
    Route("GET", "/metrics", health.metrics),
)
_OPEN_HANDLERS = {route.handler for route in ROUTES if route.is_open}


def make_app(state: ServerState) -> web.Application:
    """The application for one server's state."""
    app = web.Application(middlewares=[_surround], client_max_size=state.options.max_body_bytes)
    app[STATE] = state
    app[KEY_DIGESTS] = tuple(hashlib.sha256(key.encode()).digest() for key in state.options.api_key)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
    return app


@web.middleware
async def _surround(request: web.Request, handler: Handler) -> web.StreamResponse:
    guards = request.app.get(GUARDS)
    transport = request.transport
    if guards is not None:
        guards.request_started(transport)
    request[REQUEST_ID] = _request_id(request)
    status = STATUS_CLIENT_LEFT
    try:
        response = await _answer(request, handler)
        status = response.status
        if not response.prepared:
            response.headers["X-Request-Id"] = request[REQUEST_ID]
        return response
    finally:
        request.app[STATE].metrics.count_response(_route_path(request), status)
        if guards is not None:
            guards.request_finished(transport)


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The handler's response, or the error's: as a status, or as an event when the stream has begun."""
    try:
        _check_key(request)
        return await handler(request)
    except ApiError as error:
        return await _fail(request, error)
    except web.HTTPException as error:
        return await _fail(request, from_http_exception(error))
    except SlowClientError as error:
        logger.warning("%s: %s; its requests were aborted", request[REQUEST_ID], error)
        return _left(request)
    except ConnectionError:  # the client left between two writes
        return _left(request)
    except Exception:
        logger.exception("request %s failed", request[REQUEST_ID])
        return await _fail(request, ApiError(500, "the server failed on this request", code="internal_error"))


async def _fail(request: web.Request, error: ApiError) -> web.StreamResponse:
    events: EventStream | None = request.get(EVENTS)
    if events is None or not events.is_started:
        return error_response(error)
    try:
        await events.send(error.body)
        await events.done()
    except ConnectionError:
        logger.debug("the client left before the error event")
    return events.response


def _left(request: web.Request) -> web.StreamResponse:
    """What aiohttp wants returned when nobody is there to read it."""
    events: EventStream | None = request.get(EVENTS)
    return web.Response(status=STATUS_CLIENT_LEFT) if events is None else events.response


def _check_key(request: web.Request) -> None:
    digests = request.app[KEY_DIGESTS]
    if not digests or request.match_info.handler in _OPEN_HANDLERS:
        return
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
    # every key is compared, each in constant time: neither a match's place nor a prefix shows in the time taken
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    if scheme.lower() != "bearer" or not any(matches):
        message = "a valid API key is needed: send the header Authorization: Bearer <key>"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


_SAFE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def _request_id(request: web.Request) -> str:
    """The client's ``X-Request-Id`` if it is harmless, else a new one."""
    given = request.headers.get("X-Request-Id", "")
    return given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex


def _route_path(request: web.Request) -> str:
    """The route's pattern: a label with few values, whatever paths clients try."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"
