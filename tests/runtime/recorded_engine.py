"""Engines whose steps run on a device runner that records them, in the place of the eager ones."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from engine.fake_stream import FakeStream

from graphserve.config import EngineConfig
from graphserve.engine import model_executor
from graphserve.engine.device_executor import DeviceExecutor
from graphserve.engine.executor import Executor
from graphserve.engine.llm_engine import LLMEngine
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.load import LoadedModel
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.recorder import Recorder


@contextmanager
def recorded_steps(
    decode_sizes: Sequence[int] | None = None, delays: random.Random | None = None, **options: Any
) -> Iterator[list[DeviceRunner]]:
    """Engines made inside record their steps; the list holds their runners in the order of their making.

    Args:
        decode_sizes: as for :class:`DeviceExecutor`.
        delays: steps run on a fake stream, at random times after they were submitted; by default at once.
        options: of :class:`DeviceRunner`.
    """
    runners: list[DeviceRunner] = []
    options = {"graphs": Recorder, "record_after": 0, **options}

    def make(runner: ModelRunner) -> Executor:
        runners.append(DeviceRunner(runner.plan, dict(runner.weights), runner.device, **options))
        executor = DeviceExecutor(runners[-1], decode_sizes)
        return executor if delays is None else FakeStream(executor, delays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_executor, "ModelExecutor", make)
        yield runners


def recorded_engine(loaded: LoadedModel, config: EngineConfig, **options: Any) -> tuple[LLMEngine, DeviceRunner]:
    """An engine over a loaded model, and its runner; options as for :func:`recorded_steps`."""
    with recorded_steps(**options) as runners:
        engine = LLMEngine.from_loaded(config, loaded)
    return engine, runners[0]
