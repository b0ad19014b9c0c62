"""``graphserve warmup``: compile ahead, so that a start compiles nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from graphserve import progress
from graphserve.cli.engine_options import add_engine_options, add_model_argument, engine_config, fetch_model


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "warmup",
        help="compile a model ahead of serving it",
        description="Store the model's plan and compiled kernels, so that later starts compile nothing. Exit status 1 "
        "with --check when something is missing.",
    )
    add_model_argument(parser)
    parser.add_argument("--check", action="store_true", help="only tell whether everything is stored, compile nothing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the store (default: the user's cache)")
    add_engine_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Fill or check the store; print its report."""
    config = engine_config(options)
    fetch_model(config)
    progress.set_sink(progress.StreamSink())
    from graphserve.compiler.warmup import run_warmup

    report = run_warmup(config, output=options.output, check=options.check)
    sys.stdout.write(str(report).rstrip() + "\n")
    return 0 if report.is_complete else 1
