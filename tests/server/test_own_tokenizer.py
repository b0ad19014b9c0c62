"""The API process's own tokenizer: loaded while the engine loads, never converted, taken from the engine if need be."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphserve.engine.messages import TokenizerSource
from graphserve.engine.served_engine import converted_tokenizer
from graphserve.errors import CacheMissError, ConfigError
from graphserve.models.tokenizer import load_tokenizer
from graphserve.server import serve
from graphserve.server.renderer import make_tokenizer

TEXT = "Once <|end|> é"
CHAT = [{"role": "user", "content": "hi"}]


def test_it_is_loaded_while_the_engine_loads(make_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_server(engine={"load_s": 0.5}) as server:
        was_ready = []

        def make(source: TokenizerSource) -> Any:
            was_ready.append(server.client.is_ready)
            return make_tokenizer(source)

        monkeypatch.setattr(serve, "make_tokenizer", make)
        server.start()
        assert was_ready == [False]
        assert server.request("POST", "/v1/completions", {"prompt": "abc"})[0] == 200


def test_one_that_cannot_be_read_ends_the_start_without_waiting_for_the_engine(
    make_server: Any, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with (
        make_server(engine={"tokenizer_path": str(tmp_path), "load_s": 600}) as server,
        pytest.raises(ConfigError, match="tokenizer.json cannot be read"),
    ):
        server.start()


def test_an_engine_that_fails_while_it_is_loaded_gives_the_one_error(
    make_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "started").touch()
    with (
        make_server(engine={"starts_once": str(tmp_path / "started")}) as server,
        pytest.raises(ConfigError, match="it started once"),
    ):
        server.start()
    assert len(asyncio.all_tasks(server._loop)) == 0


def test_a_converted_one_comes_from_the_engine_and_is_the_same(byte_tokenizer: Path, start_server: Any) -> None:
    original = load_tokenizer(byte_tokenizer)
    sent = converted_tokenizer(original)
    received = make_tokenizer(TokenizerSource(converted=sent))
    assert received is not None
    assert received.encode(TEXT) == original.encode(TEXT)
    assert received.apply_chat_template(CHAT) == original.apply_chat_template(CHAT)
    assert (received.eos_token_id, received.special_tokens) == (original.eos_token_id, original.special_tokens)
    converted = {"json": sent.json, "special_tokens": sent.special_tokens, "chat_templates": sent.chat_templates}
    with start_server(engine={"tokenizer_path": "/no/such/folder", "converted": converted}) as server:
        status, answer, _ = server.request("POST", "/v1/chat/completions", {"messages": CHAT, "max_tokens": 6})
        assert status == 200 and answer["usage"]["prompt_tokens"] == len("<user>hi\n<a>")


def test_none_is_made_where_the_engine_has_none() -> None:
    assert make_tokenizer(TokenizerSource()) is None


def test_nothing_is_converted_in_the_api_process(shared_models: Path, tmp_path: Path) -> None:
    source = shared_models / "stories260K"
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    with pytest.raises(CacheMissError, match="the converted tokenizer of .* is not in the store"):
        make_tokenizer(TokenizerSource(str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_config": "/no/such"}, "generation_config='/no/such'"),
        ({"override_generation_config": {"num_beams": 3}}, "num_beams=3"),
        ({"override_generation_config": {"temperature": 9}}, "temperature=9"),
        ({"compile_cache": "/no/such"}, "compile_cache='/no/such' does not exist"),
        ({"compile_cache": __file__}, "cannot be read"),
        ({"model": "/no/such"}, "model '/no/such' was not found"),
        ({"tokenizer": "/no/such"}, "model '/no/such' was not found"),
    ],
)
def test_wrong_options_are_refused_before_torch_is_imported(options: dict[str, Any], message: str) -> None:
    code = (
        "import json, sys\n"
        "from graphserve.engine.served_engine import load_engine\n"
        "try:\n"
        "    load_engine(json.loads(sys.argv[1]), print)\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code, json.dumps(options)], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("graphserve.errors.ConfigError: ") and message in result.stderr
