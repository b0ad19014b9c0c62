"""Finding a model: folders, the demo, and a hub served by a local HTTP server."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphserve.errors import ConfigError
from graphserve.models.hub import resolve_model

UNREACHABLE = "http://127.0.0.1:9"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Runs in its own process: huggingface_hub reads its endpoint and offline switch when it is imported.
DOWNLOAD = """
import json, sys
from graphserve.errors import GraphserveError
from graphserve.models.hub import resolve_model
for name in sys.argv[2:]:
    reports = []
    try:
        folder = resolve_model(name, download_dir=sys.argv[1], progress=lambda *report: reports.append(report))
        answer = {"files": sorted(path.name for path in folder.iterdir()), "reports": reports}
    except GraphserveError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
"""


def test_a_folder_with_a_config_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_the_demo_is_embedded_in_the_package() -> None:
    folder = resolve_model("demo")
    assert (folder / "config.json").is_file()
    assert folder.parent.name == "graphserve"


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_a_name_that_is_neither_folder_nor_hub_id_says_what_was_tried() -> None:
    with pytest.raises(ConfigError, match=r"tried the folder '/no/such/folder'.*not a hub id.*'demo'"):
        resolve_model("/no/such/folder")


@pytest.mark.parametrize("name", ["demo", "folder"])
def test_a_revision_of_something_local_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="revision='v1'.*not a hub id"):
        resolve_model(name if name == "demo" else str(tmp_path), revision="v1")


def test_offline_and_not_cached_says_so(tmp_path: Path) -> None:
    (answer,) = _download(["owner/absent"], tmp_path, UNREACHABLE, offline=True)
    assert "HF_HUB_OFFLINE is set" in answer["error"]
    assert "'owner/absent'" in answer["error"] and str(tmp_path) in answer["error"]


def test_an_unreachable_hub_says_so(tmp_path: Path) -> None:
    (answer,) = _download(["owner/absent"], tmp_path, UNREACHABLE)
    assert "could not be reached" in answer["error"]


class Hub(http.server.ThreadingHTTPServer):
    """The part of the hub's HTTP interface that a snapshot download uses, over ``{repository: {file: bytes}}``."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = repositories
        self.fetched: list[str] = []


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            name = "/".join(parts[2:4])
            files = self.server.repositories.get(name)
            if files is None:
                return self._send(401, b'{"error": "Invalid username or password."}', {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            if parts[4] == "tree":
                entries = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in files.items()
                ]
                return self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            body = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
            return self._send(200, body.encode(), {"Content-Type": "application/json"})
        name, file = "/".join(parts[:2]), parts[-1]
        data = self.server.repositories[name][file]
        if with_body:
            self.server.fetched.append(f"{name}/{file}")
        etag = hashlib.sha1(data).hexdigest()
        self._send(200, data if with_body else b"", {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, len(data))

    def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


LLAMA_CONFIG = json.dumps({"model_type": "llama"}).encode()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub(
        {
            "owner/good": {
                "config.json": LLAMA_CONFIG,
                "tokenizer.json": b"{}",
                "chat_template.jinja": b"{{ messages }}",
                "model.safetensors": b"w" * 300_000,
                "consolidated.safetensors": b"w",
                "pytorch_model.bin": b"p",
                "modeling_custom.py": b"print()",
                "README.md": b"words",
            },
            "owner/pickle": {"config.json": LLAMA_CONFIG, "pytorch_model.bin": b"p"},
            "owner/code": {
                "config.json": b'{"model_type": "made_up", "auto_map": {"AutoModelForCausalLM": "m.C"}}',
                "model.safetensors": b"w",
            },
        }
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def answers(hub: Hub, cache: Path) -> dict[str, dict[str, Any]]:
    """What resolve_model did with each name, one after the other in one process."""
    names = ["owner/good", "owner/missing", "owner/pickle", "owner/code"]
    return dict(zip(names, _download(names, cache, f"http://127.0.0.1:{hub.server_port}"), strict=True))


def test_a_download_takes_config_tokenizer_and_safetensors_only(answers: dict[str, dict[str, Any]]) -> None:
    answer = answers["owner/good"]
    assert answer["files"] == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    name, done, total = answer["reports"][-1]
    assert name == "download owner/good" and done == total == 300_000
    counts = [done for _, done, _ in answer["reports"]]
    assert counts == sorted(counts) and counts.count(300_000) == 1


def test_a_cached_model_is_found_offline(answers: dict[str, dict[str, Any]], cache: Path) -> None:
    (answer,) = _download(["owner/good"], cache, UNREACHABLE, offline=True)
    assert answer["files"] == answers["owner/good"]["files"]


def test_a_repository_that_does_not_exist_says_what_was_tried(answers: dict[str, dict[str, Any]]) -> None:
    error = answers["owner/missing"]["error"]
    assert "tried the folder 'owner/missing'" in error and "no such repository" in error


def test_pickle_weights_alone_are_refused_with_the_remedy(answers: dict[str, dict[str, Any]], hub: Hub) -> None:
    error = answers["owner/pickle"]["error"]
    assert "only pickle weights (pytorch_model.bin)" in error and "save_pretrained" in error
    assert "owner/pickle/pytorch_model.bin" not in hub.fetched


def test_remote_code_is_refused_before_weights_are_fetched(answers: dict[str, dict[str, Any]], hub: Hub) -> None:
    assert "'made_up' needs Python code shipped with the checkpoint" in answers["owner/code"]["error"]
    assert [path for path in hub.fetched if path.startswith("owner/code")] == ["owner/code/config.json"]


def _download(names: list[str], cache: Path, endpoint: str, offline: bool = False) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    for key in [key for key in environment if key.lower().endswith("_proxy")]:
        del environment[key]
    command = [sys.executable, "-c", DOWNLOAD, str(cache), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
