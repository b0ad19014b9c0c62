"""The command line as a user meets it: start time, help, errors, exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphserve import __version__
from graphserve.cli.errors import describe
from graphserve.errors import CheckpointError, ConfigError, UnsupportedModelError

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "aiohttp", "tokenizers")
COMMANDS = ("generate", "chat", "serve", "explain", "warmup")


def run(*arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m graphserve`` with ``arguments``; with no stdin given, it is empty."""
    return subprocess.run(
        [sys.executable, "-m", "graphserve", *arguments],
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )


def imported_by(*arguments: str) -> list[str]:
    """The heavy packages that a command has imported when it ends."""
    code = (
        "import sys\nfrom graphserve.cli.main import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ).stderr.split()


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_printed(flag: str) -> None:
    result = run(flag)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"graphserve {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], *([command, "--help"] for command in COMMANDS)])
def test_version_and_help_import_nothing_heavy(arguments: list[str]) -> None:
    assert imported_by(*arguments) == []


def test_the_check_for_heavy_imports_would_see_one() -> None:
    assert (
        "numpy"
        in subprocess.run(
            [sys.executable, "-c", "import sys, numpy; sys.stderr.write(' '.join(sys.modules))"],
            capture_output=True,
            text=True,
        ).stderr.split()
    )


def test_the_server_process_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, graphserve.server.serve, graphserve.engine.client, graphserve.server.renderer as r\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_no_command_prints_the_help() -> None:
    result = run()
    assert result.returncode == 0 and all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_names_the_model_argument(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0 and "MODEL" in result.stdout and result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["bake"], 2, "bake"),
        (["generate", "--max-tokens", "many"], 2, "many"),
        (["generate", "--max-tok", "5"], 2, "--max-tok"),
        (["generate", "--dtype", "int3"], 2, "int3"),
        (["generate", "no/such-folder/at/all", "--prompt", "a"], 2, "no/such-folder/at/all"),
        (["generate", "--prompt", "a", "--max-num-seqs", "0"], 2, "max_num_seqs"),
        (["generate", "--prompt", "a", "--override-generation-config", "{"], 2, "JSON"),
        (["serve", "--port", "99999"], 2, "port"),
        (["serve", "--drain-timeout", "-1"], 2, "drain_timeout"),
        (["serve", "--api-key", ""], 2, "api_key"),
        (["serve", "--host", "203.0.113.77", "--port", "0"], 2, "203.0.113.77"),
    ],
)
def test_an_error_is_one_line_and_a_hint_without_a_traceback(arguments: list[str], status: int, word: str) -> None:
    result = run(*arguments)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == status and result.stdout == ""
    assert lines[-2].startswith("error: ") and word in lines[-2] and lines[-1].startswith("hint: ")
    assert "Traceback" not in result.stderr


def test_a_taken_port_is_refused_before_the_model_is_loaded() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", "--port", port)
    assert result.returncode == 2 and f"port {port}" in result.stderr and "load" not in result.stderr


@pytest.mark.parametrize("switch", [["--debug"], []])
def test_debugging_shows_the_traceback_too(switch: list[str]) -> None:
    environment: dict[str, Any] = {} if switch else {"GRAPHSERVE_DEBUG": "1"}
    result = run("generate", "no/such-folder/at/all", "--prompt", "a", *switch, **environment)
    assert result.returncode == 2 and "Traceback" in result.stderr and result.stderr.splitlines()[-1][:5] == "hint:"


def test_wrong_input_is_status_2_and_any_other_failure_status_1() -> None:
    assert describe(ConfigError("a\n  b"), "serve") == (
        2,
        "error: a b\nhint: graphserve serve --help lists the options\n",
    )
    assert describe(CheckpointError("x"), "serve")[0] == 1
    assert "graphserve explain" in describe(UnsupportedModelError("x"), "serve")[1]
    assert describe(KeyError("k"), "serve")[1].startswith("error: KeyError: 'k'\nhint: run again with --debug")
