"""A tiered start of steps that a device records: plain torch first, recorded kernels as soon as they are built."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from graphserve.artifacts import ArtifactStore
from graphserve.engine.device_executor import DeviceExecutor
from graphserve.engine.executor import StepSizes
from graphserve.errors import CacheMissError, CompileError
from graphserve.kernels.triton import compile_jobs
from graphserve.plan.runner import Action, Arena, Binder, StepSize
from graphserve.plan.schema import Plan
from graphserve.runtime import step_lowering
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.recorder import Recorder
from graphserve.runtime.step_input import SamplingInput
from graphserve.runtime.step_lowering import TritonLowering
from graphserve.runtime.step_programs import References
from tests.runtime.step_models import BLOCK_SIZE, CPU, LANES, MAX_TOKENS, decode_step, table_plan, table_runner
from tests.runtime.stub_cuda import StubCuda


class LateKernels(References):
    """Launches of an embedding have a kernel, once it is built."""

    def __init__(self) -> None:
        self.is_complete = False
        self.is_built = False
        self.num_kernel_launches = 0

    def lower(self, plans: Sequence[Plan], kv_cache: KVCache, table_len: int) -> list[tuple[Plan, dict[str, Binder]]]:
        def with_kernel(plan: Plan) -> Plan:
            launches = [
                msgspec.structs.replace(x, kind="triton") if x.op.startswith("gs.embedding") else x
                for x in plan.launches
            ]
            return msgspec.structs.replace(plan, launches=launches)

        return [(with_kernel(plan), {"triton": self}) for plan in plans]

    def bind(self, launch: Any, runner: Any, tensors: Any, size: StepSize) -> Action | None:
        if not self.is_complete:
            return None
        ids, table, out = (tensors[name] for name in ("input_ids", "table", "rows"))

        def action() -> None:
            self.num_kernel_launches += 1
            torch.index_select(table, 0, ids[0], out=out[0])

        return action

    def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
        return actions

    def complete(self) -> bool:
        self.is_complete = self.is_built
        return self.is_built


def test_kernels_take_over_between_two_steps_and_only_then_steps_are_recorded() -> None:
    table = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    lowering = LateKernels()
    runner = table_runner(table, lowering=lowering)
    step = decode_step([3, 5], SamplingInput(2))
    expected = table[[3, 5]].argmax(-1).tolist()
    runner.record([StepSize((2, 2, 2))], ["greedy"])
    for _ in range(6):
        assert runner.submit(step).result().token_ids == expected
    assert runner.num_graphs == lowering.num_kernel_launches == 0 and runner.num_eager_steps == 6
    before = runner.submit(step)  # under way while the kernels take over
    lowering.is_built = True
    after = runner.submit(step)
    assert before.result().token_ids == after.result().token_ids == expected
    launches = lowering.num_kernel_launches
    assert launches > 0
    assert runner.submit(step).result().token_ids == expected
    assert runner.num_graphs == 1 and runner.num_eager_steps == 7 and lowering.num_kernel_launches > launches
    runner.close()


def test_an_executor_records_nothing_ahead_of_the_kernels() -> None:
    runner = DeviceRunner(table_plan(16), {"table": torch.zeros(16, 16)}, CPU, lowering=LateKernels(), graphs=Recorder)
    executor = DeviceExecutor(runner, record_ahead=("greedy",))
    executor.allocate(8, BLOCK_SIZE, StepSizes(MAX_TOKENS, LANES, LANES, LANES))
    assert executor.stats().num_graphs == 0
    executor.close()


def test_programs_that_cannot_be_made_close_their_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[LateKernels] = []
    monkeypatch.setattr(LateKernels, "close", lambda lowering: closed.append(lowering))

    def no_room(arena: Arena, num_bytes: int) -> None:
        raise MemoryError(f"no room for {num_bytes} bytes")

    monkeypatch.setattr(Arena, "reserve", no_room)
    lowering = LateKernels()
    with pytest.raises(MemoryError, match="no room"):
        table_runner(torch.zeros(16, 16), lowering=lowering)
    assert closed == [lowering]


class TableLowering:
    """The lowering of the table model for a GPU that is not there.

    Attributes:
        may_build: set to let the background go on.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, is_strict: bool = False) -> None:
        self.may_build = threading.Event()
        compile_in_processes = step_lowering.compile_in_processes

        def held_up(*args: Any, **options: Any) -> None:
            assert self.may_build.wait(60)
            compile_in_processes(*args, **options)

        monkeypatch.setattr(step_lowering, "compile_in_processes", held_up)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        self._store = ArtifactStore(root, is_strict)
        self._stub = StubCuda({})
        self._show_binaries()
        monkeypatch.setattr(step_lowering, "CudaDriver", lambda: CudaDriver(self._stub))
        self.lowering = TritonLowering(CPU, SimpleNamespace(cuda_stream=0), self._store, overlap=False, is_tiered=True)
        plan = table_plan(16)
        cache = KVCache(plan, 8, BLOCK_SIZE, CPU)
        ((self._plan, binders),) = self.lowering.lower([plan], cache, 4)
        self._binder = binders["triton"]
        keys, values = cache.layers[0]
        self._tensors = {
            "input_ids": torch.zeros(1, 2, dtype=torch.int64), "table": torch.zeros(16, 16), "kv_k.0": keys,
            "rows": torch.zeros(1, 2, 16), "heads": torch.zeros(2, 1, 16), "kv_v.0": values,
            "slot_mapping.0": torch.zeros(2, dtype=torch.int64), "logits": torch.zeros(1, 2, 16),
            "logits_indices": torch.zeros(2, dtype=torch.int64),
        }  # fmt: skip

    def num_bound(self) -> int:
        """Launches that have a kernel."""
        launches = [x for x in self._plan.launches if x.kind == "triton"]
        size = StepSize((2, 2, 2))
        return sum(self._binder.bind(x, None, self._tensors, size) is not None for x in launches)

    def wait(self) -> None:
        assert self.lowering._background is not None
        self.lowering._background.wait()
        self._show_binaries()

    def _show_binaries(self) -> None:
        for kernel in self._store.artifacts("triton"):
            self._stub.cubins[kernel.manifest.label.split()[0]] = kernel.read("binary")


def test_launches_have_their_kernels_once_the_background_has_built_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiered = TableLowering(tmp_path, monkeypatch)
    lowering = tiered.lowering
    assert not lowering.is_complete and not lowering.complete() and tiered.num_bound() == 0
    tiered.may_build.set()
    tiered.wait()
    assert tiered.num_bound() == 0, "only complete() takes them"
    assert lowering.complete() and lowering.is_complete
    num_kernels = tiered.num_bound()
    assert num_kernels == 3
    lowering.close()
    # What is stored is used at once, what is not is plain torch.
    next(ArtifactStore(tmp_path).artifacts("triton")).folder.rename(tmp_path / "away")
    part = TableLowering(tmp_path, monkeypatch)
    assert not part.lowering.is_complete and part.num_bound() == num_kernels - 1
    part.may_build.set()
    part.wait()
    assert part.lowering.complete() and part.num_bound() == num_kernels
    part.lowering.close()
    warm = TableLowering(tmp_path, monkeypatch, is_strict=True)
    assert warm.lowering.is_complete and warm.num_bound() == num_kernels
    warm.lowering.close()


def test_a_build_that_fails_leaves_plain_torch_running_unrecorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise CompileError("the compiler is broken")

    monkeypatch.setattr(step_lowering, "compile_in_processes", fail)
    tiered = TableLowering(tmp_path, monkeypatch)
    tiered.may_build.set()
    tiered.wait()
    for _ in range(2):
        assert not tiered.lowering.complete() and not tiered.lowering.is_complete
    assert caplog.text.count("the compiler is broken") == 1
    tiered.lowering.close()


def test_what_was_built_before_a_failure_is_used_and_no_step_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_late(kernels: list[Any], *args: Any, **options: Any) -> None:
        compile_jobs.compile_in_processes(kernels[:1], *args, **options)
        raise CompileError("the compiler was killed")

    monkeypatch.setattr(step_lowering, "compile_in_processes", fail_late)
    tiered = TableLowering(tmp_path, monkeypatch)
    tiered.may_build.set()
    tiered.wait()
    assert tiered.lowering.complete() and not tiered.lowering.is_complete and tiered.num_bound() == 1
    assert "(2 of 3)" in caplog.text and "the compiler was killed" in caplog.text
    tiered.lowering.close()


def test_kernels_that_the_store_did_not_keep_are_not_compiled_in_the_middle_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_lowering, "compile_in_processes", lambda *_, **__: None)
    tiered = TableLowering(tmp_path, monkeypatch)
    tiered.may_build.set()
    tiered.wait()
    assert not tiered.lowering.complete() and not tiered.lowering.is_complete and tiered.num_bound() == 0
    assert f"{tmp_path} did not keep them" in caplog.text
    tiered.lowering.close()


def test_closing_stops_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tiered = TableLowering(tmp_path, monkeypatch)
    background = tiered.lowering._background
    assert background is not None
    threading.Timer(0.2, tiered.may_build.set).start()
    tiered.lowering.close()
    assert background.is_done and not list(ArtifactStore(tmp_path).artifacts("triton"))
    assert "3 of 3 kernels are compiled in the background" in caplog.text and "kernels built" not in caplog.text


def test_a_strict_store_refuses_to_build_in_the_background_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheMissError, match="is not in the store"):
        TableLowering(tmp_path, monkeypatch, is_strict=True)
