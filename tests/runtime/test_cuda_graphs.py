"""Capturing against a stand-in for torch.cuda: no GPU is needed."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphserve.plan.runner import StepSize
from graphserve.plan.schema import Launch
from graphserve.runtime.cuda_graphs import CudaGraphs
from graphserve.runtime.step_graphs import GraphKey, Recording
from graphserve.runtime.step_input import SamplingInput
from tests.runtime.step_models import decode_step, table_runner

LAUNCH = Launch("aten.mul.Tensor", (), {}, ())


def key(size: int) -> GraphKey:
    return GraphKey("greedy", 0, StepSize((size, size, size)))


class StubCuda:
    """What :class:`CudaGraphs` uses of torch.cuda. A replay makes the captured launches; a capture takes one MiB."""

    def __init__(self, memory: int = 100 << 20) -> None:
        self.free = memory
        self.events: list[str] = []
        self.capturing: StubGraph | None = None
        self.pools: set[Any] = set()
        self._num_handles = 0

    def graph_pool_handle(self) -> tuple[int, int]:
        self._num_handles += 1
        return (0, self._num_handles)

    def mem_get_info(self) -> tuple[int, int]:
        return self.free, 1 << 40

    def current_stream(self) -> StubCuda:
        return self

    def synchronize(self) -> None:
        assert self.capturing is None, "nothing may wait during a capture"
        self.events.append("synchronize")

    def CUDAGraph(self) -> StubGraph:  # noqa: N802
        return StubGraph(self)


class StubGraph:
    def __init__(self, cuda: StubCuda) -> None:
        self._cuda = cuda
        self.is_reset = False

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self._cuda.capturing = self
        self._cuda.pools.add(pool)
        assert capture_error_mode == "thread_local"

    def capture_end(self) -> None:
        self._cuda.capturing = None
        if self._cuda.free < 1 << 20:
            raise RuntimeError("CUDA error: out of memory")
        self._cuda.free -= 1 << 20

    def replay(self) -> None:
        self._cuda.events.append("replay")

    def reset(self) -> None:
        self.is_reset = True


def recording(*actions: Callable[[], object]) -> Recording:
    return Recording([(LAUNCH, action) for action in actions], {}, dict)


def test_launches_are_made_once_and_then_captured_in_order() -> None:
    cuda = StubCuda()
    graphs = CudaGraphs(cuda)

    def action(name: str) -> Callable[[], None]:
        return lambda: cuda.events.append(f"{name}{' captured' if cuda.capturing else ''}")

    assert graphs.record(key(8), recording(action("a"), action("b")))
    assert cuda.events == ["a", "b", "synchronize", "a captured", "b captured"]
    graphs.replay(key(8))
    assert cuda.events[-1] == "replay" and key(8) in graphs and key(4) not in graphs


def test_all_graphs_share_one_pool_and_their_memory_is_counted() -> None:
    cuda = StubCuda()
    graphs = CudaGraphs(cuda)
    for size in (8, 4, 1):
        assert graphs.record(key(size), recording())
    assert len(cuda.pools) == 1 and len(graphs) == 3 and graphs.num_bytes == 3 << 20


def test_graphs_that_are_recorded_after_all_were_destroyed_have_a_pool_of_their_own() -> None:
    cuda = StubCuda()
    graphs = CudaGraphs(cuda)
    for num_pools in (1, 2):
        graphs.close()
        assert len(graphs) == graphs.num_bytes == 0
        assert graphs.record(key(1), recording()) and graphs.record(key(2), recording())
        assert len(cuda.pools) == num_pools and graphs.num_bytes == 2 << 20


def test_garbage_is_not_collected_during_a_capture() -> None:
    cuda = StubCuda()
    states: list[tuple[bool, bool]] = []
    assert gc.isenabled()
    CudaGraphs(cuda).record(key(1), recording(lambda: states.append((cuda.capturing is not None, gc.isenabled()))))
    assert states == [(False, True), (True, False)] and gc.isenabled()


def test_without_memory_the_size_and_larger_ones_stay_eager_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cuda = StubCuda(memory=(2 << 20) - 1)
    graphs = CudaGraphs(cuda)
    with caplog.at_level(logging.WARNING):
        assert graphs.record(key(4), recording())
        assert not graphs.record(key(8), recording())
        assert not graphs.record(key(16), recording())
    assert [record.getMessage() for record in caplog.records] == [
        "no memory to capture a graph for 8 tokens, 8 rows and 8 sequences: steps of this size and larger ones launch "
        "eagerly, which is slower (lower max_num_seqs or gpu_memory_utilization)"
    ]
    cuda.free = 8 << 20
    assert graphs.record(key(2), recording()) and len(graphs) == 2
    graphs.close()
    assert graphs.record(key(8), recording()), "those that had the memory are gone"


def test_torchs_own_lack_of_memory_ends_the_capture() -> None:
    cuda = StubCuda()

    def fail() -> None:
        if cuda.capturing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert not CudaGraphs(cuda).record(key(8), recording(fail))
    assert cuda.capturing is None, "the stream has left capture mode"


def test_another_failure_is_raised_and_ends_the_capture() -> None:
    cuda = StubCuda()

    def fail() -> None:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphs = CudaGraphs(cuda)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.record(key(8), recording(fail))
    assert cuda.capturing is None and key(8) not in graphs and gc.isenabled()


def test_a_graph_keeps_what_it_points_into_until_it_is_closed() -> None:
    class Thing:
        is_alive = True

        def __del__(self) -> None:
            Thing.is_alive = False

        def __call__(self) -> None:
            pass

    graphs = CudaGraphs(StubCuda())
    graphs.record(key(1), recording(Thing()))
    gc.collect()
    assert Thing.is_alive
    graphs.close()
    gc.collect()
    assert not Thing.is_alive and len(graphs) == 0


def test_a_runner_that_lacks_memory_for_graphs_gives_the_same_tokens() -> None:
    """The device runner over these graphs: what cannot be captured launches eagerly."""
    table = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    runner = table_runner(table, graphs=lambda scalars: CudaGraphs(StubCuda(memory=0)))
    for _ in range(2):
        assert (
            runner.submit(decode_step([3, 4], SamplingInput(2))).result().token_ids == table[[3, 4]].argmax(-1).tolist()
        )
    assert runner.num_eager_steps == 2
