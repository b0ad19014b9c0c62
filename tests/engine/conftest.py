"""Whole modules of engine tests run twice: with each step awaited, and one step behind a stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine.fake_stream import one_step_behind


@pytest.fixture(scope="module", params=[1, 2], ids=["awaited", "one behind"])
def depth(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many steps may be in flight in the engines that the module makes."""
    if request.param == 1:
        yield 1
        return
    with one_step_behind(seed=4):
        yield 2
