"""``graphserve explain``: what the compiler does with a model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from graphserve import progress
from graphserve.cli.engine_options import add_model_argument


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="show passes, matches and refusals for a model",
        description="Show what every compiler pass matched in the model, what it refused and why, and the launches of "
        "the plan. The weights are not read.",
    )
    add_model_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--config-only", action="store_true", help="only config.json is needed: download nothing else")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    progress.set_sink(progress.StreamSink())
    from graphserve.compiler.explain import run_explain

    sys.stdout.write(run_explain(options.model, json=options.json, config_only=options.config_only).rstrip() + "\n")
    return 0
