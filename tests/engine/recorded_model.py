"""The engine's fake model as a plan of one launch, so that its steps run on a device runner and are recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine.fake_model import FakeRunner

from graphserve.engine import model_executor
from graphserve.engine.device_executor import DeviceExecutor
from graphserve.plan.runner import Action, Binder, PlanRunner, StepSize
from graphserve.plan.schema import Launch, Plan, TensorSpec
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.recorder import Recorder
from graphserve.runtime.step_input import SamplingInput, StepInput
from graphserve.runtime.step_programs import References

MAX_MODEL_LEN = 512

# Never called: a launch's op tells which values it reads, and a binder stands for its kernel.
_LIBRARY = torch.library.Library("gs_fake", "FRAGMENT")
_LIBRARY.define(
    "model(Tensor input_ids, Tensor positions, Tensor logits_indices, Tensor query_start_loc, Tensor seq_lens,"
    " Tensor[] slot_mappings, Tensor[] block_tables) -> Tensor"
)


class FakeKernel(References):
    """The launch of a fake model: the lowering of a step's plans, and the binder of their one ``triton`` launch."""

    def __init__(self, model: FakeRunner) -> None:
        self._model = model

    @property
    def plan(self) -> Plan:
        """The model's plan with its launch."""
        plan = self._model.plan
        groups = range(len(plan.cache_groups))
        args: list[Any] = [
            {"v": name} for name in ("input_ids", "positions", "logits_indices", "query_start_loc", "seq_lens")
        ]
        args += [[{"v": f"slot_mapping.{g}"} for g in groups], [{"v": f"block_table.{g}"} for g in groups]]
        return msgspec.structs.replace(
            plan,
            model={"max_model_len": MAX_MODEL_LEN, **plan.model},
            launches=[Launch("gs_fake.model.default", tuple(args), {}, ("logits",), "triton")],
            buffers={"logits": TensorSpec(("R", self._model.vocab), "float32")},
        )

    def lower(self, plans: Sequence[Plan], kv_cache: KVCache, table_len: int) -> list[tuple[Plan, dict[str, Binder]]]:
        self._model.allocate_kv_cache(kv_cache.num_blocks, kv_cache.block_size)
        return [(plan, {"triton": self}) for plan in plans]

    def bind(self, launch: Launch, runner: PlanRunner, tensors: Mapping[str, Any], size: StepSize) -> Action:
        logits = tensors["logits"]
        arrays = [
            [tensors[v["v"]].numpy() for v in value] if isinstance(value, list) else tensors[value["v"]].numpy()
            for value in launch.args
        ]
        return lambda: logits.copy_(self._run(*arrays))

    def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
        return actions

    def close(self) -> None:
        self._model.close()

    def _run(
        self, input_ids: Any, positions: Any, logits_indices: Any, query_start_loc: Any, seq_lens: Any, slots: Any,
        tables: Any,
    ) -> torch.Tensor:  # fmt: skip
        num_tokens = int(query_start_loc[-1])
        if num_tokens == 0:  # a step without effect, made to be recorded
            return torch.zeros(len(logits_indices), self._model.vocab)
        no_lanes = np.zeros(0, np.int32)
        step = StepInput(
            input_ids[0], positions[0], query_start_loc, seq_lens, tables, slots, logits_indices, no_lanes, no_lanes,
            SamplingInput(0), num_tokens, int((seq_lens > 0).sum()), len(logits_indices),
        )  # fmt: skip
        return self._model.forward(step)


@contextmanager
def recorded_fake_models() -> Iterator[list[DeviceRunner]]:
    """Engines made inside over fake models record every step; the list holds their runners."""
    runners: list[DeviceRunner] = []

    def make(model: FakeRunner) -> DeviceExecutor:
        model.allows_ended_lanes = True
        kernel = FakeKernel(model)
        runners.append(DeviceRunner(kernel.plan, {}, model.device, lowering=kernel, graphs=Recorder, record_after=0))
        return DeviceExecutor(runners[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_executor, "ModelExecutor", make)
        yield runners
