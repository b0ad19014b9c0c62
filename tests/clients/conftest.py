"""One ``graphserve serve`` over a real model for all client tests: loading it is most of their cost."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from clients.serve_process import ServeProcess


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
