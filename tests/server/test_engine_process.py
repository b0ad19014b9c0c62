"""The engine process and its client: crash, restart, giving up, start errors, and no orphans."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_until

from graphserve import progress
from graphserve.engine import child
from graphserve.engine.client import EngineClient
from graphserve.engine.messages import (
    MAX_FRAME_BYTES,
    AbortRequests,
    AddRequest,
    MessageSocket,
    OutputDelta,
    Shutdown,
    ToEngine,
    encode_frame,
    frame_length,
)
from graphserve.errors import ConfigError, EngineDeadError
from graphserve.kernels.triton.compile_jobs import _Worker
from graphserve.progress import PhaseEvent
from graphserve.sampling_params import SamplingParams

COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize("prompt", ["<crash>", "<exit>"])
def test_a_dead_engine_ends_streams_with_an_error_event_and_comes_back(start_server: Any, prompt: str) -> None:
    with start_server(engine={"step_s": 0.01}) as server:
        first_engine = server.client.process_id
        victim = server.connection()
        body = msgspec.json.encode({"prompt": "abc", "max_tokens": 4000, "stream": True})
        victim.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        response = victim.getresponse()
        assert response.status == 200 and response.read(5) == b"data:"
        status, answer, _ = server.request("POST", COMPLETIONS, {"prompt": prompt})
        assert status == 500 and answer["error"]["code"] == "engine_dead"
        rest = response.read().decode()
        assert rest.rstrip().endswith("data: [DONE]") and '"engine_dead"' in rest
        victim.close()
        assert server.request("GET", "/health/live")[0] == 200
        wait_until(lambda: server.request("GET", "/health/ready")[0] == 200)
        assert server.client.process_id != first_engine and server.metric("graphserve:engine_restarts_total") == 1
        assert server.request("POST", COMPLETIONS, {"prompt": "abc"})[0] == 200


def test_while_the_engine_restarts_the_server_is_live_not_ready_and_answers_503(start_server: Any) -> None:
    with start_server(restart_pauses_s=(0.5,)) as server:
        os.kill(server.client.process_id, signal.SIGKILL)
        wait_until(lambda: server.request("GET", "/health/ready")[0] == 503)
        status, answer, headers = server.request("POST", COMPLETIONS, {"prompt": "abc"})
        assert status == 503 and headers["Retry-After"] and answer["error"]["code"] == "unavailable"
        assert server.request("GET", "/health/live")[0] == 200
        wait_until(lambda: server.request("GET", "/health/ready")[0] == 200)


def test_metrics_never_decrease_over_a_restart(start_server: Any) -> None:
    with start_server() as server:
        server.request("POST", COMPLETIONS, {"prompt": "abc", "max_tokens": 7})
        os.kill(server.client.process_id, signal.SIGKILL)
        wait_until(lambda: server.metric("graphserve:engine_restarts_total") == 1)
        wait_until(lambda: server.request("GET", "/health/ready")[0] == 200)
        assert server.metric("graphserve:generation_tokens_total") == 7
        assert server.metric("graphserve:engine_variant_steps_total") == 7
        server.request("POST", COMPLETIONS, {"prompt": "abc", "max_tokens": 3})
        assert server.metric("graphserve:generation_tokens_total") == 10
        assert server.metric("graphserve:engine_variant_steps_total") == 10


def test_an_engine_that_cannot_restart_is_given_up_after_its_tries(start_server: Any, tmp_path: Path) -> None:
    with start_server(engine={"starts_once": str(tmp_path / "started")}) as server:
        os.kill(server.client.process_id, signal.SIGKILL)
        server.run(server.client.wait_until_gone())
        assert server.client.state == "failed" and server.client.num_restarts == 2
        assert server.request("GET", "/health/live")[0] == 200
        assert server.request("GET", "/health/ready")[0] == 503


def test_an_error_while_loading_reaches_the_caller_as_its_own_class(start_server: Any) -> None:
    with pytest.raises(ConfigError, match="this model cannot be served"), start_server(engine={"refuses_to_start": 1}):
        pass


def test_the_port_answers_live_and_not_ready_while_the_engine_loads(make_server: Any) -> None:
    with make_server(engine={"load_s": 1.0}) as server:
        server.run(server.server.listen())
        loading = server.begin(server.server.load())
        status, answer, headers = server.request("POST", COMPLETIONS, {"prompt": "abc"})
        assert status == 503 and "loading" in answer["error"]["message"] and headers["Retry-After"]
        assert server.request("GET", "/v1/models")[0] == server.request("GET", "/health/ready")[0] == 503
        assert server.request("GET", "/health/live")[0] == 200 == server.request("GET", "/metrics")[0]
        loading.result(30)
        assert server.request("POST", COMPLETIONS, {"prompt": "abc"})[0] == 200


def test_an_engine_that_is_killed_while_it_loads_takes_its_compilers_and_temporary_files_along(
    make_server: Any, tmp_path: Path
) -> None:
    events: list[PhaseEvent] = []
    previous = progress.set_sink(events.append)
    try:
        with make_server(engine={"compiles": str(tmp_path / "report"), "load_s": 60}) as server:
            loading = server.begin(server.server.load())
            compiler, folder = _compiling(tmp_path / "report")
            os.kill(server.client.process_id, signal.SIGKILL)
            with pytest.raises(
                EngineDeadError, match=r"while it loaded \(killed by SIGKILL, mostly for a lack of memory"
            ):
                loading.result(10)
            assert not folder.parent.exists()
            wait_until(lambda: not _is_alive(compiler))
    finally:
        progress.set_sink(previous)
    assert [(event.state, event.note) for event in events] == [("begin", ""), ("fail", "the engine process ended")]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_server_that_is_stopped_while_its_engine_compiles_leaves_nothing_behind(
    byte_tokenizer: Path, tmp_path: Path, number: int, status: int
) -> None:
    server = _start(byte_tokenizer, compiles=str(tmp_path / "report"), load_s=60)
    compiler, folder = _compiling(tmp_path / "report")
    server.send_signal(number)
    assert server.wait(10) == status
    wait_until(lambda: not _is_alive(compiler) and not folder.parent.exists())
    server.stdout.close()


def test_a_compiler_that_outlives_the_engine_is_ended_with_a_server_that_drains(
    byte_tokenizer: Path, tmp_path: Path
) -> None:
    server = _start(byte_tokenizer, compiles=str(tmp_path / "report"))
    _announced(server)
    compiler, folder = _compiling(tmp_path / "report")
    server.terminate()
    assert server.wait(10) == 0
    assert not folder.parent.exists()
    wait_until(lambda: not _is_alive(compiler))
    server.stdout.close()


@pytest.mark.parametrize(("handler", "shares_group"), [(signal.SIG_IGN, True), (signal.default_int_handler, False)])
def test_a_kernel_compiler_is_in_the_group_of_an_engine_process_and_else_out_of_reach_of_ctrl_c(
    tmp_path: Path, handler: Any, shares_group: bool
) -> None:
    previous = signal.signal(signal.SIGINT, handler)
    try:
        with _Worker("cuda:90", tmp_path, niceness=0) as worker:
            assert (os.getpgid(worker._process.pid) == os.getpgrp()) == shares_group
    finally:
        signal.signal(signal.SIGINT, previous)


def test_without_a_place_for_temporary_files_the_engine_starts_all_the_same(
    start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(child.tempfile, "mkdtemp", refuse)
    with start_server() as server:
        assert server.request("POST", COMPLETIONS, {"prompt": "abc"})[0] == 200


def test_a_spawned_engine_is_the_one_that_is_started(make_server: Any) -> None:
    with make_server() as server:
        server.client.spawn()
        spawned = server.client.process_id
        server.start()
        assert server.client.process_id == spawned


def test_a_spawned_engine_ends_with_a_server_that_never_listened(make_server: Any) -> None:
    with make_server(engine={"load_s": 600}) as server:
        server.client.spawn()
        assert _is_alive(server.client.process_id)
    assert not _is_alive(server.client.process_id)


def test_a_process_that_cannot_be_started_is_an_error_of_ours_and_leaves_no_folder(
    byte_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client = EngineClient({}, ["/no/such/program"])
    with pytest.raises(EngineDeadError, match="cannot be started: .*/no/such/program"):
        asyncio.run(client.start())
    assert list(tmp_path.iterdir()) == []


def test_a_killed_parent_leaves_no_engine_behind(byte_tokenizer: Path) -> None:
    server = _start(byte_tokenizer, step_s=0.0, drain_s=1.0)
    _, engine_pid = _announced(server)
    server.kill()
    server.wait(10)
    wait_until(lambda: not _is_alive(engine_pid))
    server.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_running_requests_refuses_new_ones_and_exits_0(byte_tokenizer: Path, number: int) -> None:
    server = _start(byte_tokenizer, step_s=0.02, drain_s=20.0)
    port, engine_pid = _announced(server)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as running:
        running.sendall(_post({"prompt": "abc", "max_tokens": 40, "stream": True}))
        received = running.recv(4096)
        assert b"200 OK" in received
        server.send_signal(number)
        wait_until(lambda: _status(port, b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n") == 503)
        assert _status(port, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n") == 200
        assert _status(port, _post({"prompt": "abc"})) == 503
        while part := running.recv(4096):
            received += part
    assert received.count(b'"text":"') == 41 and b'"finish_reason":"length"' in received and b"[DONE]" in received
    assert server.wait(10) == 0 and not _is_alive(engine_pid)
    server.stdout.close()


def test_requests_that_outlast_the_drain_end_with_an_error_event_and_status_0(byte_tokenizer: Path) -> None:
    server = _start(byte_tokenizer, step_s=0.02, drain_s=0.3)
    port, _ = _announced(server)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as running:
        running.sendall(_post({"prompt": "abc", "max_tokens": 4000, "stream": True}))
        received = running.recv(4096)
        server.send_signal(signal.SIGTERM)
        while part := running.recv(65536):
            received += part
    assert b'"engine_dead"' in received and b"[DONE]" in received
    assert server.wait(10) == 0
    server.stdout.close()


def test_a_second_signal_ends_at_once_with_status_1(byte_tokenizer: Path) -> None:
    server = _start(byte_tokenizer, step_s=0.02, drain_s=60.0)
    port, engine_pid = _announced(server)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as running:
        running.sendall(_post({"prompt": "abc", "max_tokens": 4000, "stream": True}))
        running.recv(4096)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: _status(port, b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n") == 503)
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 1
    wait_until(lambda: not _is_alive(engine_pid))
    server.stdout.close()


def test_a_server_whose_engine_is_lost_for_good_exits_1(byte_tokenizer: Path) -> None:
    server = _start(byte_tokenizer, step_s=0.0, drain_s=1.0)
    _, engine_pid = _announced(server)
    os.kill(engine_pid, signal.SIGKILL)
    assert server.wait(20) == 1
    server.stdout.close()


@given(
    st.lists(st.text(max_size=20), max_size=4),
    st.lists(st.integers(0, 2**31), max_size=20),
    st.dictionaries(st.integers(0, 500), st.floats(-100, 100), max_size=3),
)
def test_messages_survive_the_socket_in_any_sizes(names: list[str], ids: list[int], bias: dict[int, float]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection: MessageSocket[ToEngine] = MessageSocket(theirs, msgspec.msgpack.Decoder(ToEngine))
        request = AddRequest("r", ids, SamplingParams(logit_bias=bias), "text")
        for message in (AbortRequests(names), request, Shutdown()):
            MessageSocket(ours, msgspec.msgpack.Decoder(ToEngine)).send(message)
            assert connection.receive() == message
        ours.close()
        assert connection.receive() is None


def test_a_frame_of_an_absurd_length_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the limit"):
        frame_length((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    assert frame_length(encode_frame(Shutdown())[:4]) == len(encode_frame(Shutdown())) - 4


def test_an_unknown_message_is_refused_by_its_tag() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"type": "Unpickle", "data": b""}), type=ToEngine)


def test_merged_deltas_equal_the_deltas_in_order() -> None:
    first = OutputDelta("r", 0, "a", [1], [{}], prompt_logprobs=[None])
    first.merge(OutputDelta("r", 0, "b", [2], [{}]))
    first.merge(OutputDelta("r", 0, "", [3], [{}], "stop", "x", 4))
    assert first == OutputDelta("r", 0, "ab", [1, 2, 3], [{}, {}, {}], "stop", "x", 4, [None])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(first), type=OutputDelta) == first


def _start(tokenizer: Path, drain_s: float = 1.0, **engine: Any) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("echo_server.py")
    root = str(script.parents[2])
    config = json.dumps({"tokenizer_path": str(tokenizer), **engine})
    return subprocess.Popen(
        [sys.executable, str(script), config, str(drain_s)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )


def _compiling(report: Path) -> tuple[int, Path]:
    """Process and temporary folder of a compiler that an engine has started."""
    wait_until(report.exists)
    pid, folder = report.read_text().splitlines()
    assert _is_alive(int(pid)) and Path(folder).is_dir()
    assert Path(folder).parent.name.startswith("graphserve-engine-")
    return int(pid), Path(folder)


def _announced(server: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Port and engine process of a server that has become ready."""
    assert server.stdout is not None
    url, engine_pid = server.stdout.readline().decode().split()
    return int(url.rsplit(":", 1)[1]), int(engine_pid)


def _post(body: dict[str, Any]) -> bytes:
    data = msgspec.json.encode(body)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def _status(port: int, request: bytes) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(request)
        return int(sock.recv(4096).split()[1])


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
