"""A server over the echo engine as a program, for tests of signals: ``echo_server.py CONFIG DRAIN_S``.

CONFIG is that of the engine, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from graphserve.engine.client import EngineClient
from graphserve.engine.messages import EngineInfo
from graphserve.server.options import ServerOptions
from graphserve.server.serve import Server, serve


def announce(server: Server, info: EngineInfo) -> None:
    sys.stdout.write(f"{server.url} {server.state.client.process_id}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    config, drain_s = sys.argv[1:]
    engine = [sys.executable, str(Path(__file__).with_name("fake_engine.py"))]
    client = EngineClient(json.loads(config), engine, restart_pauses_s=())
    options = ServerOptions(port=0, drain_timeout=float(drain_s))
    sys.exit(asyncio.run(serve(options, client, announce)))
