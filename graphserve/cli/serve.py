"""``graphserve serve``: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from graphserve import progress
from graphserve.cli.engine_options import add_engine_options, add_model_argument, engine_config
from graphserve.cli.struct_options import add_struct_options, given_options
from graphserve.server.options import ServerOptions

if TYPE_CHECKING:
    from graphserve.engine.messages import EngineInfo
    from graphserve.server.serve import Server

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Declare the command and its flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, OpenAI-compatible",
        description="Serve /v1/completions, /v1/chat/completions, /v1/models, /health, /version and /metrics. "
        "SIGTERM or Ctrl-C drains and ends; a second one ends at once.",
    )
    add_model_argument(parser)
    add_struct_options(parser.add_argument_group("server options"), ServerOptions)
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    add_engine_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Serve until a signal; returns the server's exit status."""
    config = engine_config(options)
    server_options = _server_options(options)
    os.environ["GRAPHSERVE_LOG_LEVEL"] = options.log_level  # for the engine process
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    progress.set_sink(progress.StreamSink())
    from graphserve.engine.client import EngineClient

    begin = time.monotonic()
    client = EngineClient(config.to_kwargs())
    client.spawn()  # it loads while the server is imported
    from graphserve.server.serve import serve

    def announce(server: Server, info: EngineInfo) -> None:
        names = " or ".join(info.served_model_names)
        sys.stderr.write(
            f"serving {names} on {server.url} after {time.monotonic() - begin:.1f} s: contexts of "
            f"{info.max_model_len} tokens, {info.max_num_seqs} sequences at once, {info.num_blocks} KV blocks of "
            f"{info.block_size} tokens\n"
        )
        if not server.options.api_key and server.options.host not in _LOOPBACK:
            sys.stderr.write("warning: the server is reachable from other machines and needs no --api-key\n")
        sys.stderr.write(
            f"try: curl {server.url}/v1/completions -H 'Content-Type: application/json' "
            '-d \'{"prompt": "Once upon a time", "max_tokens": 32}\'\n'
        )
        sys.stderr.flush()

    import asyncio  # takes long to import, and the parser of every command imports this module

    status = asyncio.run(serve(server_options, client, announce))
    seconds = time.monotonic() - begin
    tokens = client.total_stats.generation_tokens_total
    sys.stderr.write(f"served {client.num_submitted} requests with {tokens} tokens in {seconds:.1f} s\n")
    return status


def _server_options(options: argparse.Namespace) -> ServerOptions:
    values = given_options(options, ServerOptions)
    if not values.get("api_key") and (key := os.environ.get("GRAPHSERVE_API_KEY")):
        values["api_key"] = [key]
    return ServerOptions(**values)
