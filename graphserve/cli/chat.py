"""``graphserve chat``: a conversation with a model in this process."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from graphserve.cli.engine_options import (
    add_local_options,
    add_model_argument,
    engine_config,
    fetch_model,
    sampling_params,
)
from graphserve.errors import RequestError

if TYPE_CHECKING:
    from graphserve.cli.local_engine import LocalEngine
    from graphserve.sampling_params import SamplingParams

_HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends, Ctrl-C stops an answer\n"


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="A conversation; answers stream to stdout. Each line of stdin is a message. " + _HELP.strip(),
    )
    add_model_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message at the head of the conversation")
    add_local_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Read messages and answer them until the input ends."""
    config = engine_config(options)
    fetch_model(config)
    from graphserve.cli.local_engine import LocalEngine

    with LocalEngine(config) as engine:
        params = sampling_params(options, engine.default_sampling_params, max_tokens=None)
        conversation = Conversation(engine, params, options.system)
        if sys.stdin.isatty():
            _enable_line_editing()
            sys.stderr.write(_HELP)
        while (line := _read_line()) is not None:
            if not conversation.handle(line):
                break
    return 0


class Conversation:
    """The messages so far. Invariant: user and assistant messages alternate after the system message, if any."""

    def __init__(self, engine: LocalEngine, params: SamplingParams, system: str | None) -> None:
        self._engine, self._params = engine, params
        self._head = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._head)

    def handle(self, line: str) -> bool:
        """Act on one line of input; False ends the conversation."""
        from graphserve.cli.local_engine import warnings_afterwards

        match line.strip():
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/reset":
                self._messages = list(self._head)
                sys.stderr.write("the conversation starts anew\n")
            case command if command.startswith("/"):
                sys.stderr.write(f"unknown command {command.split()[0]}; {_HELP}")
            case text:
                with warnings_afterwards():
                    self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        answer = ""
        try:
            prompt = self._engine.render_chat(messages)
            for piece, _ in self._engine.stream(prompt, self._params, is_rendered=True):
                answer += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        except RequestError as error:
            # the message does not fit or the template refuses it: say so and keep the conversation as it was
            sys.stderr.write(f"error: {error}\nhint: /reset forgets the conversation so far\n")
            return
        except KeyboardInterrupt:
            sys.stderr.write(" (stopped)")
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._messages = [*messages, {"role": "assistant", "content": answer}]


def _read_line() -> str | None:
    """The next message, or None at the end of the input. A prompt is shown to a person only, and on stderr."""
    try:
        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        if sys.stdout.isatty():
            return input("> ")  # through readline, which needs to know the prompt
        sys.stderr.write("> ")
        sys.stderr.flush()
        return sys.stdin.readline() or None
    except EOFError:
        sys.stderr.write("\n")
        return None


def _enable_line_editing() -> None:
    with contextlib.suppress(ImportError):  # not built into every Python; input() works without it
        import readline  # noqa: F401  (importing it gives input() history and editing)
