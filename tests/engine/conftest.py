"""Whole modules of engine tests run three times: each step awaited, one step behind a stream, and recorded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine.fake_stream import one_step_behind
from engine.recorded_model import recorded_fake_models


@pytest.fixture(scope="module", params=["awaited", "one behind", "recorded"])
def depth(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many steps may be in flight in the engines that the module makes."""
    if request.param == "awaited":
        yield 1
        return
    with one_step_behind(seed=4) if request.param == "one behind" else recorded_fake_models():
        yield 2
