"""Reading request bodies and writing JSON answers."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from graphserve.server.errors import ApiError
from graphserve.server.state import STATE

_encoder = msgspec.json.Encoder()


def json_response(body: Any) -> web.Response:
    """A 200 with ``body`` (a msgspec struct or plain data) as JSON."""
    return web.Response(body=_encoder.encode(body), content_type="application/json")


async def read_body(request: web.Request) -> bytes:
    """The whole body of a JSON request.

    Raises:
        ApiError: 415 for another content type, 408 when the body does not arrive in time, 400 when it breaks off.
        web.HTTPRequestEntityTooLarge: it exceeds the size limit.
    """
    content_type = request.headers.get("Content-Type")
    kind = request.content_type
    if content_type is not None and kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"content type {kind[:64]!r} is not accepted: send application/json")
    options = request.app[STATE].options
    announced = request.content_length or 0
    if announced > options.max_body_bytes:
        raise web.HTTPRequestEntityTooLarge(options.max_body_bytes, announced)
    timeout_s = options.body_timeout
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except TimeoutError:
        message = f"the request body did not arrive within {timeout_s:g} s"
        raise ApiError(408, message, is_final=True) from None
    except RequestPayloadError:
        raise ApiError(400, "the request body is malformed or broke off", is_final=True) from None
