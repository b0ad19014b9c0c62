"""``graphserve explain``: what the compiler does with a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from graphserve import progress
from graphserve.cli.engine_options import add_model_argument


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="show passes, matches and refusals for a model",
        description="Show what every compiler pass matched in the model, what it refused and why, and the launches of "
        "the plan. The weights are not read, unless --verify is given.",
    )
    add_model_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--config-only", action="store_true", help="only config.json is needed: download nothing else")
    parser.add_argument("--target", default="cpu", help="cpu (default), cuda:80, cuda:90, cuda:100 or hip:gfx942")
    parser.add_argument("--device", default="h200", help="device whose limits a GPU target is held against (h200)")
    parser.add_argument("--batch", type=int, default=1, help="requests of the decode step that is counted (1)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each of them (1024)")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write graphs around each pass and kernel sources")
    parser.add_argument("--verify", action="store_true", help="hold the logits after every pass against transformers")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    previous = progress.set_sink(progress.StreamSink())
    try:
        from graphserve.compiler.explain import run_explain

        report = run_explain(
            options.model,
            json=options.json,
            config_only=options.config_only,
            target=options.target,
            device=options.device,
            batch=options.batch,
            context=options.context,
            dump_dir=options.dump,
            verify=options.verify,
        )
    finally:
        progress.set_sink(previous)
    sys.stdout.write(report.rstrip() + "\n")
    return 0
