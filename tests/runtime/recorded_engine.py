"""Engines whose steps run on a device runner that records them, in the place of the eager ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from graphserve.config import EngineConfig
from graphserve.engine import model_executor
from graphserve.engine.device_executor import DeviceExecutor
from graphserve.engine.llm_engine import LLMEngine
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.load import LoadedModel
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.recorder import Recorder


@contextmanager
def recorded_steps(decode_sizes: Sequence[int] | None = None, **options: Any) -> Iterator[list[DeviceRunner]]:
    """Engines made inside record their steps; the list holds their runners in the order of their making.

    Args:
        decode_sizes: as for :class:`DeviceExecutor`.
        options: of :class:`DeviceRunner`.
    """
    runners: list[DeviceRunner] = []
    options = {"graphs": Recorder, "record_after": 0, **options}

    def make(runner: ModelRunner) -> DeviceExecutor:
        runners.append(DeviceRunner(runner.plan, dict(runner.weights), runner.device, **options))
        return DeviceExecutor(runners[-1], decode_sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_executor, "ModelExecutor", make)
        yield runners


def recorded_engine(
    loaded: LoadedModel, config: EngineConfig, decode_sizes: Sequence[int] | None = None, **options: Any
) -> tuple[LLMEngine, DeviceRunner]:
    """An engine over a loaded model, and its runner."""
    with recorded_steps(decode_sizes, **options) as runners:
        engine = LLMEngine.from_loaded(config, loaded)
    return engine, runners[0]
