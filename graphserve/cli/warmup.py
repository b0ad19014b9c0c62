"""``graphserve warmup``: compile ahead, so that a start compiles nothing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from graphserve import progress
from graphserve.cli.engine_options import add_engine_options, add_model_argument, engine_config, fetch_model
from graphserve.errors import ConfigError
from graphserve.startup import without_collector

# Options that decide nothing of what is compiled, or where it goes (--output says that here).
_WITHOUT = ("compile_cache", "strict_compile_cache", "start")


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "warmup",
        help="compile a model ahead of serving it",
        description="Store the model's plan and compiled kernels, so that later starts compile nothing. config.json is "
        "enough, and no GPU is needed for a GPU target. Step sizes need no list: kernels take them at run time. Exit "
        "status 1 if something is missing.",
    )
    add_model_argument(parser)
    parser.add_argument(
        "--target",
        default="cpu",
        metavar="LIST",
        help="comma-separated: cpu (this processor), cpu:LEVEL, cuda:80, cuda:90, cuda:100, hip:gfx942 (default: cpu)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="folder or .tar.zst file to fill (default: the user's cache)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at a time (default: one a processor)")
    parser.add_argument("--check", action="store_true", help="only tell whether everything is stored, compile nothing")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also load the model here, time its decode steps, and store how they run fastest on this device "
        "(random weights where only config.json is at hand); a table that is stored is kept",
    )
    parser.add_argument("--report", action="store_true", help="print one JSON document with a row for each artifact")
    add_engine_options(parser, without=_WITHOUT)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Fill or check the store; print its report."""
    config = engine_config(options)
    fetch_model(config)
    targets = list(dict.fromkeys(target.strip() for target in options.target.split(",")))
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: give 1 or more")
    previous = progress.set_sink(progress.StreamSink())
    try:
        with without_collector():
            from graphserve.compiler.warmup import run_warmup
            from graphserve.engine.measure_choices import measure_choices

            measure = measure_choices if options.measure else None
            report = run_warmup(config, options.output, targets, options.check, options.jobs, measure)
    finally:
        progress.set_sink(previous)
    text = json.dumps(report.as_dict(), indent=1) if options.report else str(report)
    sys.stdout.write(text.rstrip() + "\n")
    return 0 if report.is_complete else 1
