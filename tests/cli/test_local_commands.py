"""``generate`` and ``chat`` with the demo model: one process, and one engine that the other tests share."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphserve.cli.local_engine import warnings_afterwards
from graphserve.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "graphserve"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
GENERATE = ["generate", "--max-tokens", "16", "--prompt", "Once upon a time"]


class Terminal(io.StringIO):
    """Typed lines of a person."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    from graphserve.cli.local_engine import LocalEngine
    from graphserve.config import EngineConfig

    with LocalEngine(EngineConfig(max_model_len=256)) as engine:
        yield engine


@pytest.fixture
def engine(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Commands that this process runs find the loaded engine instead of loading their own."""
    monkeypatch.setattr("graphserve.cli.local_engine.LocalEngine", lambda config: contextlib.nullcontext(loaded))
    return loaded


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what stdin holds."""
    return lambda text, stream=io.StringIO: monkeypatch.setattr(sys, "stdin", stream(text))


def test_generate_prints_only_the_text_and_reports_phases_on_stderr(
    engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.run([*COMMAND, *GENERATE], capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("\n") and "Once upon" not in process.stdout
    for phase in ("load tokenizer: done in", "load weights: done in", "generated 16 tokens in"):
        assert phase in process.stderr
    assert "\x1b" not in process.stderr, "no terminal, so no colours and no bars"
    assert main(GENERATE) == 0 and capsys.readouterr().out == process.stdout


def test_several_prompts_give_what_each_gives_alone(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(GENERATE) == 0
    alone = capsys.readouterr().out.rstrip("\n")
    assert main([*GENERATE, "--prompt", "The dog", "-p", "Once upon a time"]) == 0
    assert capsys.readouterr().out.startswith(alone + "\n\n")
    assert main([*GENERATE, "--n", "2", "--temperature", "1", "--seed", "1"]) == 0
    first, second = capsys.readouterr().out.rstrip("\n").split("\n\n", 1)
    assert first != second


def test_generate_reads_its_prompt_from_a_pipe(engine: Any, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(GENERATE) == 0
    from_flag = capsys.readouterr().out
    say("Once upon a time")
    assert main(["generate", "--max-tokens", "16"]) == 0
    assert capsys.readouterr().out == from_flag
    say("", Terminal)
    assert main(["generate"]) == 2 and "--prompt" in capsys.readouterr().err


def test_chat_answers_each_line_of_a_pipe_until_quit(engine: Any, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    say("Hello!\n\n/reset\n/wrong\nHello!\n/quit\nnever read\n")
    assert main(["chat", "--max-tokens", "8", "--stop", "\n"]) == 0
    printed = capsys.readouterr()
    first, second = printed.out.strip().splitlines()
    assert first == second, "after /reset the same message gets the same answer"
    assert "unknown command /wrong" in printed.err and "> " not in printed.out + printed.err


def test_chat_remembers_the_conversation(engine: Any, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[list[dict[str, str]]] = []
    original = engine.render_chat
    monkeypatch.setattr(engine, "render_chat", lambda messages: rendered.append(messages) or original(messages))
    say("Hello!\nHow are you?\n")
    assert main(["chat", "--system", "Be kind.", "--max-tokens", "4"]) == 0
    assert [message["role"] for message in rendered[1]] == ["system", "user", "assistant", "user"]
    assert rendered[1][:2] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]


def test_a_message_that_does_not_fit_is_reported_and_the_conversation_goes_on(
    engine: Any, say: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    say("word " * 1000 + "\nHello!\n")
    assert main(["chat", "--max-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "/reset" in printed.err and printed.out.count("\n") == 1


def test_ctrl_c_stops_an_answer_and_leaves_nothing_in_the_engine(
    engine: Any, say: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = engine.stream

    def interrupted(*arguments: Any, **options: Any) -> Iterator[tuple[str, int]]:
        pieces = stream(*arguments, **options)
        try:
            yield next(pieces)
            raise KeyboardInterrupt
        finally:
            pieces.close()

    monkeypatch.setattr(engine, "stream", interrupted)
    say("Hello!\n")
    assert main(["chat"]) == 0
    assert "(stopped)" in capsys.readouterr().err
    assert not engine._engine.has_unfinished_requests() and engine._engine.stats().num_blocks_in_use == 0


@pytest.mark.full
def test_ctrl_c_while_loading_ends_generate_without_a_traceback() -> None:
    process = subprocess.Popen([*COMMAND, *GENERATE], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    with process.stderr as rest:
        assert "Traceback" not in rest.read()
    assert process.wait(60) == 130


@pytest.mark.full
@pytest.mark.parametrize(("extra", "has_color"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_gets_bars_and_colours_unless_no_color_is_set(extra: dict[str, str], has_color: bool) -> None:
    main_end, process_end = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm", **extra}
    process = subprocess.Popen([*COMMAND, *GENERATE], stdout=subprocess.DEVNULL, stderr=process_end, env=environment)
    os.close(process_end)
    seen = b""
    with contextlib.suppress(OSError):  # raised once the process has closed its end
        while part := os.read(main_end, 4096):
            seen += part
    os.close(main_end)
    assert process.wait(60) == 0
    assert (b"\x1b[32m" in seen) == has_color and b"\r\x1b[K" in seen


def test_a_warning_waits_for_the_end_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("graphserve.runtime")
    with warnings_afterwards():
        logger.warning("plain torch goes on")
        logger.info("not worth a line")
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err == "plain torch goes on\n"
    assert not logging.getLogger("graphserve").handlers
