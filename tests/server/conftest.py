"""A server over the echo engine, in a thread of the test process; one a module, since starting is most of the cost."""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from graphserve.engine.client import EngineClient
from graphserve.server.options import ServerOptions
from graphserve.server.serve import Server

FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + m.role + ' is unknown') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if shout %}!{% endif %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of one token a byte, whose ids are the bytes' values, and a chat template."""
    folder = tmp_path_factory.mktemp("byte-tokenizer")
    alphabet = _byte_alphabet()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={char: byte for byte, char in alphabet.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    return folder


def _byte_alphabet() -> dict[int, str]:
    """Byte → the character that byte-level BPE writes for it (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}


class RunningServer:
    """A server on its own thread and event loop, and a small blocking client for it."""

    def __init__(self, options: ServerOptions, client: EngineClient) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.client = client
        self.server = self.run(_make(options, client))

    def start(self) -> RunningServer:
        self.run(self.server.listen())
        self.run(self.server.load())
        return self

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop and return its result."""
        return self.begin(coroutine).result(60)

    def begin(self, coroutine: Any) -> Future[Any]:
        """The same without waiting."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    @property
    def port(self) -> int:
        return int(self.server.url.rsplit(":", 1)[1])

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, decoded body (JSON if it is JSON) and headers of one exchange."""
        connection = self.connection()
        try:
            is_json = not isinstance(body, (bytes, str)) and body is not None
            sent = json.dumps(body) if is_json else body
            all_headers = ({"Content-Type": "application/json"} if body is not None else {}) | (headers or {})
            connection.request(method, path, sent, all_headers)
            response = connection.getresponse()
            data = response.read()
            is_json_answer = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(data) if is_json_answer else data, dict(response.headers)
        finally:
            connection.close()

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream, ``[DONE]`` included as a string."""
        status, data, _ = self.request("POST", path, {**body, "stream": True})
        assert status == 200, data
        events = [part.removeprefix("data: ") for part in data.decode().split("\n\n") if part]
        return [event if event == "[DONE]" else json.loads(event) for event in events]

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        _, text, _ = self.request("GET", "/metrics")
        lines = [line for line in text.decode().splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def close(self) -> None:
        self.run(self.server.close(is_forced=True))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


async def _make(options: ServerOptions, client: EngineClient) -> Server:
    return Server(options, client)


StartServer = Callable[..., Any]


@pytest.fixture(scope="session")
def make_server(byte_tokenizer: Path) -> StartServer:
    """``with make_server(engine={...}, **options) as server``: a server over the echo engine, not yet started."""

    @contextmanager
    def make(
        engine: dict[str, Any] | None = None, restart_pauses_s: tuple[float, ...] = (0.01, 0.02), **options: Any
    ) -> Iterator[RunningServer]:
        config = {"tokenizer_path": str(byte_tokenizer), **(engine or {})}
        client = EngineClient(config, FAKE_ENGINE, restart_pauses_s)
        running = RunningServer(ServerOptions(port=0, **options), client)
        try:
            yield running
        finally:
            running.close()

    return make


@pytest.fixture(scope="session")
def start_server(make_server: StartServer) -> StartServer:
    """The same, started: it admits requests."""

    @contextmanager
    def start(**arguments: Any) -> Iterator[RunningServer]:
        with make_server(**arguments) as running:
            yield running.start()

    return start


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Iterator[RunningServer]:
    """The module's shared server with default options."""
    with start_server() as running:
        yield running
