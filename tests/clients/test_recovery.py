"""A real engine process that is killed under a running stream."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
from waiting import wait_until


def engine_process(parent: int) -> int:
    """The engine process of a server, from the process table."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (engine,) = [pid for pid in children if b"graphserve.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(engine)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health/ready") as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False


@pytest.mark.full
def test_a_killed_engine_ends_streams_with_an_error_and_serves_again(served: Any, client: openai.OpenAI) -> None:
    url, server = served
    request: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "temperature": 0}
    before = client.completions.create(**request, max_tokens=16).choices[0].text
    stream = client.completions.create(**request, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    os.kill(engine_process(server.process.pid), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine stopped"):
        list(stream)
    assert not is_ready(url)
    wait_until(lambda: is_ready(url), 120)
    assert client.completions.create(**request, max_tokens=16).choices[0].text == before
