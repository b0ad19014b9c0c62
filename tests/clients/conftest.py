"""One ``graphserve serve`` over a real model for all client tests: loading it is most of their cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


class ServeProcess:
    """``graphserve serve MODEL`` as a process; ``stderr`` grows as it writes."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "graphserve", "serve", model, "--port", "0", *options]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.stderr = ""
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self, timeout_s: float = 240.0) -> str:
        """The server's address."""
        assert self._is_ready.wait(timeout_s), self.stderr
        found = re.search(r"serving .* on (http://\S+)", self.stderr)
        assert found, f"the server did not start:\n{self.stderr}"
        return found[1]

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        status = self.process.wait(60)
        self._reader.join(10)
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.stderr += line
                if line.startswith("try: "):
                    self._is_ready.set()
        self._is_ready.set()


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[str, ServeProcess]]:
    """Address and process of a server over the demo model."""
    server = ServeProcess("demo", "--served-model-name", "demo", "--api-key", "test-key", "--max-model-len", "512")
    try:
        yield server.wait_until_ready(), server
        assert server.stop() == 0, server.stderr
    finally:
        server.process.kill()
        server.process.wait(10)


@pytest.fixture
def client(served: tuple[str, ServeProcess]) -> Iterator[openai.OpenAI]:
    """The synchronous client."""
    with openai.OpenAI(base_url=served[0] + "/v1", api_key="test-key", max_retries=0, timeout=60) as made:
        yield made
