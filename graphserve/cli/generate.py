"""``graphserve generate``: complete prompts with a model in this process."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphserve import progress
from graphserve.cli.engine_options import (
    add_local_options,
    add_model_argument,
    engine_config,
    fetch_model,
    sampling_params,
)
from graphserve.errors import ConfigError, RequestError
from graphserve.startup import StartupClock

if TYPE_CHECKING:
    from graphserve.cli.local_engine import LocalEngine


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="complete a prompt",
        description="Complete prompts; stdout carries only the generated text. Without --temperature and without a "
        "temperature in the model's generation config, the most likely token is taken.",
    )
    add_model_argument(parser)
    parser.add_argument(
        "-p", "--prompt", action="append", metavar="TEXT", help="text to complete; may be repeated (default: stdin)"
    )
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user message, by the chat template")
    parser.add_argument(
        "--startup-report", type=Path, metavar="FILE", help="write the time of each phase up to the first token as JSON"
    )
    add_local_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the completion of each prompt, several separated by an empty line."""
    clock = None
    if options.startup_report is not None:
        _require_folder_of(options.startup_report)
        clock = StartupClock(progress.StreamSink())
    prompts = _prompts(options)
    config = engine_config(options)
    sampling_params(options, {})  # what is wrong by itself is told before anything is loaded
    previous = progress.set_sink(clock)
    try:
        with progress.phase("import engine"):
            fetch_model(config)
            from graphserve.cli.local_engine import LocalEngine
        status = _generate(options, prompts, LocalEngine(config), clock)
    finally:
        progress.set_sink(previous)
    if clock is not None:
        clock.write(options.startup_report)
        sys.stderr.write(f"{clock}\n")
    return status


def _generate(options: argparse.Namespace, prompts: list[str], local: LocalEngine, clock: StartupClock | None) -> int:
    from graphserve.cli.local_engine import warnings_afterwards

    with local as engine:
        params = sampling_params(options, engine.default_sampling_params)
        if options.chat:
            with progress.phase("render prompts"):
                prompts = [engine.render_chat([{"role": "user", "content": prompt}]) for prompt in prompts]
        begin = time.monotonic()
        num_tokens = 0

        def on_token() -> None:
            if clock is not None:
                clock.first_token(begin)

        if len(prompts) == 1 and params.n == 1:
            with warnings_afterwards():
                for text, new_tokens in engine.stream(prompts[0], params, is_rendered=options.chat):
                    on_token()
                    num_tokens += new_tokens
                    sys.stdout.write(text)
                    sys.stdout.flush()
                sys.stdout.write("\n")
                sys.stdout.flush()
        else:
            answers = engine.complete(prompts, params, is_rendered=options.chat, on_token=on_token)
            num_tokens = sum(count for _, count in answers)
            sys.stdout.write("\n\n".join(text for text, _ in answers) + "\n")
        seconds = time.monotonic() - begin
    rate = num_tokens / max(seconds, 1e-9)
    sys.stderr.write(f"generated {num_tokens} tokens in {seconds:.2f} s ({rate:.1f} tokens/s)\n")
    return 0


def _require_folder_of(report: Path) -> None:
    if not report.parent.is_dir() or report.is_dir():
        raise ConfigError(f"--startup-report {report}: give a file in a folder that exists")


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt:
        return list(options.prompt)
    if sys.stdin.isatty():
        raise RequestError("no prompt was given: pass --prompt TEXT, or pipe the text into stdin")
    return [sys.stdin.read()]
