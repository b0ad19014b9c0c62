"""HTTP errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``.

A message for a client comes from this package's own validation or from a fixed sentence, never from the text of an
unexpected exception, which could carry paths or addresses.
"""

from __future__ import annotations

import msgspec
from aiohttp import web

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """Ends one HTTP request with ``status`` and an OpenAI error body. ``param`` names the offending field."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        is_final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}
        self.is_final = is_final  # the connection cannot be used again: part of a body may still be on its way

    @property
    def body(self) -> dict[str, object]:
        """The JSON body, as plain data."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 that names the field ``param``."""
    return ApiError(400, message, param=param, code=code)


def engine_dead() -> ApiError:
    """The engine stopped while the request ran: 500, since retrying may repeat work that was already answered."""
    return ApiError(500, "the engine stopped while this request ran; send the request again", code="engine_dead")


def unavailable(reason: str, retry_after_s: int = 1) -> ApiError:
    """503 with ``Retry-After``: loading, draining or restarting."""
    return ApiError(503, reason, code="unavailable", headers={"Retry-After": str(retry_after_s)})


def overloaded(num_running: int, limit: int) -> ApiError:
    """429 with ``Retry-After``: the queue is full."""
    message = f"{num_running} sequences are running or waiting, the limit is {limit}: try again later"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def error_response(error: ApiError) -> web.Response:
    """The HTTP response of an error."""
    response = web.Response(
        body=msgspec.json.encode(error.body),
        status=error.status,
        headers=error.headers,
        content_type="application/json",
    )
    if error.is_final:
        response.force_close()
    return response


def from_http_exception(exc: web.HTTPException) -> ApiError:
    """aiohttp's own refusals (no route, wrong method, body too large) as an :class:`ApiError`."""
    if isinstance(exc, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(exc.allowed_methods))
        return ApiError(405, f"method {exc.method} is not allowed here; use {allowed}", headers={"Allow": allowed})
    if isinstance(exc, web.HTTPRequestEntityTooLarge):
        return ApiError(413, "the request body is larger than the server accepts", is_final=True)
    if exc.status == 404:
        return ApiError(404, "there is no such path", code="unknown_url")
    return ApiError(exc.status, exc.reason or "the request cannot be served")
