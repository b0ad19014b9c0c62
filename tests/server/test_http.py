"""What surrounds a request: routes, key, limits, deadlines, and clients that leave or do not read."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from typing import Any

import aiohttp
import pytest
from waiting import wait_until

from graphserve.server.app import ROUTES

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "abc", "max_tokens": 2}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("GET", "/nope", None, {}, 404, "unknown_url"),
        ("GET", "//v1/models", None, {}, 404, "unknown_url"),
        ("GET", COMPLETIONS, None, {}, 405, None),
        ("POST", COMPLETIONS, b"{", {}, 400, "invalid_json"),
        ("POST", COMPLETIONS, b"[1]", {}, 400, "invalid_json"),
        ("POST", COMPLETIONS, b'{"prompt": "\\ud800"}', {}, 400, "invalid_json"),
        ("POST", COMPLETIONS, b'{"prompt": NaN}', {}, 400, "invalid_json"),
        ("POST", COMPLETIONS, b"[" * 100_000, {}, 400, "invalid_json"),
        ("POST", COMPLETIONS, b"prompt=a", {"Content-Type": "application/x-www-form-urlencoded"}, 415, None),
        ("POST", COMPLETIONS, json.dumps({"prompt": "a", "model": "other"}).encode(), {}, 404, "model_not_found"),
        ("GET", "/v1/models/other", None, {}, 404, "model_not_found"),
    ],
)
def test_a_refusal_has_openais_error_shape(
    server: Any, method: str, path: str, body: Any, headers: dict[str, str], status: int, code: str | None
) -> None:
    got, answer, _ = server.request(method, path, body, headers)
    assert got == status, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"} and answer["error"]["code"] == code


def test_a_body_over_the_limit_is_a_413_whether_announced_or_compressed(start_server: Any) -> None:
    with start_server(max_body_bytes=10_000) as small:
        big = json.dumps({"prompt": "a" * 20_000}).encode()
        status, answer, _ = small.request("POST", COMPLETIONS, big)
        assert status == 413 and answer["error"]["type"] == "invalid_request_error"
        bomb = gzip.compress(b" " * 5_000_000)
        assert len(bomb) < 10_000
        status, _, _ = small.request("POST", COMPLETIONS, bomb, {"Content-Encoding": "gzip"})
        assert status == 413
        assert small.request("POST", COMPLETIONS, BODY)[0] == 200


def test_models_are_listed_under_every_served_name(start_server: Any) -> None:
    with start_server(engine={"served_model_names": ["first", "org/second"]}) as named:
        _, listing, _ = named.request("GET", "/v1/models")
        assert [card["id"] for card in listing["data"]] == ["first", "org/second"]
        status, card, _ = named.request("GET", "/v1/models/org/second")
        assert status == 200 and card["max_model_len"] == 4096
        for name in ("first", "org/second"):
            _, answer, _ = named.request("POST", COMPLETIONS, {**BODY, "model": name})
            assert answer["model"] == name
        assert named.request("POST", COMPLETIONS, {**BODY, "model": "echo"})[0] == 404


def test_every_route_but_health_needs_the_key_when_one_is_set(start_server: Any) -> None:
    with start_server(api_key=["secret-1", "secret-2"]) as locked:
        for route in ROUTES:
            path = route.path.replace("{model:.+}", "echo")
            body = BODY if route.method == "POST" else None
            status, answer, headers = locked.request(route.method, path, body)
            assert (status == 401) != route.is_open, path
            if status == 401:
                assert answer["error"]["code"] == "invalid_api_key" and headers["WWW-Authenticate"] == "Bearer"
        assert locked.request("GET", "/no/such/path")[0] == 401
        for key, expected in (("secret-1", 200), ("secret-2", 200), ("secret-3", 401), ("", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert locked.request("POST", COMPLETIONS, BODY, headers)[0] == expected
        assert locked.request("POST", COMPLETIONS, BODY, {"Authorization": "Basic secret-1"})[0] == 401


def test_a_harmless_request_id_is_echoed_and_another_is_replaced(server: Any) -> None:
    _, _, headers = server.request("POST", COMPLETIONS, BODY, {"X-Request-Id": "trace-7"})
    assert headers["X-Request-Id"] == "trace-7"
    _, _, headers = server.request("POST", COMPLETIONS, BODY, {"X-Request-Id": "a b<script>"})
    assert headers["X-Request-Id"] != "a b<script>"


def test_a_full_queue_is_a_429_with_retry_after(start_server: Any) -> None:
    with start_server(engine={"max_num_seqs": 2, "step_s": 0.02}, max_num_queued_reqs=1) as small:
        connections = [small.connection() for _ in range(3)]
        for connection in connections:
            body = json.dumps({**BODY, "max_tokens": 4000, "stream": True})
            connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
            connection.getresponse().read(1)
        status, answer, headers = small.request("POST", COMPLETIONS, BODY)
        assert status == 429 and int(headers["Retry-After"]) >= 1 and answer["error"]["type"] == "rate_limit_error"
        assert small.metric("graphserve:admission_rejections_total") == 1
        for connection in connections:
            connection.close()
        wait_until(lambda: small.request("POST", COMPLETIONS, BODY)[0] == 200)


def test_a_half_sent_header_and_a_silent_connection_are_closed(start_server: Any) -> None:
    with start_server(header_timeout=0.3) as strict:
        for first_bytes in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as sock:
                sock.sendall(first_bytes)
                assert sock.recv(1) == b""
        # a second request on the same connection has the same deadline, and an idle one none of its own
        with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as sock:
            get = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
            sock.sendall(get)
            assert b"200 OK" in sock.recv(4096)
            time.sleep(0.5)
            sock.sendall(get)
            assert b"200 OK" in sock.recv(4096)
            sock.sendall(b"GET /health")
            assert sock.recv(1) == b""


def test_a_body_that_does_not_arrive_is_a_408(start_server: Any) -> None:
    with (
        start_server(body_timeout=0.3) as strict,
        socket.create_connection(("127.0.0.1", strict.port), timeout=5) as sock,
    ):
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in sock.recv(4096).split(b"\r\n")[0]


def test_an_idle_kept_alive_connection_is_closed(start_server: Any) -> None:
    with (
        start_server(keep_alive_timeout=0.3) as strict,
        socket.create_connection(("127.0.0.1", strict.port), timeout=5) as sock,
    ):
        sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in sock.recv(4096)
        assert sock.recv(1) == b""


def test_a_client_that_does_not_read_is_cut_off_and_its_request_aborted(start_server: Any) -> None:
    with start_server(write_timeout=0.3) as strict, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        sock.connect(("127.0.0.1", strict.port))
        # logprobs make the events large, so that the socket's buffers are full soon
        body = json.dumps({"prompt": ["abc"] * 64, "max_tokens": 4000, "stream": True, "logprobs": 20})
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall((head + body).encode())
        wait_until(lambda: strict.metric("graphserve:request_aborts_total") > 0, 30)
        wait_until(lambda: strict.client.stats.num_blocks_in_use == 0)
        assert strict.request("POST", COMPLETIONS, BODY)[0] == 200


@pytest.mark.parametrize("is_streamed", [True, False])
def test_200_disconnects_leave_no_block_in_use(start_server: Any, is_streamed: bool) -> None:
    async def storm(url: str) -> None:
        body = {"prompt": "abc", "max_tokens": 4000, "stream": is_streamed, "n": 2}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def leave(index: int) -> None:
                await asyncio.sleep(0.003 * index)
                task = asyncio.ensure_future(session.post(url + COMPLETIONS, json=body))
                # some leave while they are being sent or queued, some before the first token, some after it
                await asyncio.wait([task], timeout=0.02 * (index % 10))
                if task.done():
                    response = task.result()
                    assert response.status == 200
                    await response.content.read(10)
                    response.close()
                else:
                    task.cancel()
                    await asyncio.wait([task])

            await asyncio.gather(*(leave(index) for index in range(200)))

    with start_server(engine={"step_s": 0.002}, max_num_queued_reqs=1000) as stormy:
        asyncio.run(storm(stormy.server.url))
        wait_until(lambda: stormy.client.num_requests == 0 and stormy.server.state.num_sequences == 0)
        wait_until(lambda: stormy.metric("graphserve:kv_cache_blocks_in_use") == 0)
        assert stormy.metric("graphserve:num_requests_running") == 0
        assert stormy.metric("graphserve:request_aborts_total") > 0
        assert stormy.request("POST", COMPLETIONS, BODY)[0] == 200


def test_metrics_count_requests_tokens_and_reasons(start_server: Any) -> None:
    with start_server() as counted:
        for _ in range(3):
            counted.request("POST", COMPLETIONS, {"prompt": "abc", "max_tokens": 4, "n": 2})
        counted.request("POST", COMPLETIONS, {"prompt": ""})
        assert counted.metric("graphserve:request_success_total") == 6
        assert counted.metric("graphserve:generation_tokens_total") == 24
        assert counted.metric("graphserve:time_to_first_token_seconds_count") == 3
        assert counted.metric("graphserve:e2e_request_latency_seconds_count") == 6
        assert counted.metric("graphserve:request_generation_tokens_sum") == 24
        assert counted.metric("graphserve:http_responses_total") >= 4
        assert counted.metric("graphserve:engine_ready") == 1
        assert counted.metric("graphserve:engine_steps_total") == 12
        assert counted.metric("graphserve:engine_variant_steps_total") == 12
        assert counted.metric("graphserve:engine_sync_steps_total") == 1
        assert counted.metric("graphserve:engine_eager_steps_total") == 2
        assert counted.metric("graphserve:captured_graphs") == 70
        _, text, _ = counted.request("GET", "/metrics")
        assert 'variant="greedy"' in text.decode()


def test_version_and_health_answer(server: Any) -> None:
    assert server.request("GET", "/version")[1].keys() == {"version"}
    for path in ("/health", "/health/live", "/health/ready"):
        assert server.request("GET", path)[0] == 200
