"""The ``graphserve`` command: picks the command, turns errors into one line and an exit status.

Exit status: 0 success, 1 failure, 2 wrong use, 130 ended by Ctrl-C. stdout carries answers only; everything else goes
to stderr. Nothing here imports torch, so that ``--version`` and ``--help`` answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from graphserve import __version__
from graphserve.processors import use_one_blas_thread

USAGE_ERROR = 2
INTERRUPTED = 130  # the shell's convention for SIGINT

_DESCRIPTION = "Compile and serve any Hugging Face decoder. Without MODEL, every command uses the embedded demo model."


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in the form of all our errors and never guesses abbreviated names."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"error: {message}\nhint: {self.prog} --help lists what is allowed\n")


def run_process() -> NoReturn:
    """The whole life of a ``graphserve`` process: run its command, end.

    Python's own teardown takes half a second once torch is loaded. By then every command has closed what it opened, so
    the process ends without it.
    """
    use_one_blas_thread()
    status = main()
    logging.shutdown()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = status or 1
    if "torch" in sys.modules:
        from graphserve.artifacts.cache_dir import remove_own_folder

        remove_own_folder()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["-V"]):  # asked often by scripts: not even the parser is built
        sys.stdout.write(f"graphserve {__version__}\n")
        return 0
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    is_debugging = options.debug or os.environ.get("GRAPHSERVE_DEBUG", "0") not in ("", "0")
    return _run(options, is_debugging)


def make_parser() -> Parser:
    """The parser of all commands."""
    from graphserve.cli import cache, chat, explain, generate, serve, warmup

    parser = Parser(prog="graphserve", description=_DESCRIPTION)
    parser.add_argument("-V", "--version", action="version", version=f"graphserve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for module in (generate, chat, serve, explain, warmup, cache):
        command = module.add_command(commands)
        command.add_argument("--debug", action="store_true", help="show tracebacks (also: GRAPHSERVE_DEBUG=1)")
    return parser


def _run(options: argparse.Namespace, is_debugging: bool) -> int:
    from graphserve.cli.errors import describe

    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of stdout (such as head) is gone; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if is_debugging:
            traceback.print_exc()
        status, lines = describe(error, options.command)
        sys.stderr.write(lines)
        return status
