"""Reading a captured graph's nodes and comparing them with a plan, against the stand-in for the driver."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from benchmarks import graph_nodes
from benchmarks.graph_nodes import GraphReader, step_nodes
from graphserve.errors import DeviceError
from graphserve.plan.runner import BoundPlan
from graphserve.plan.schema import Launch
from graphserve.runtime.cuda_launcher import CudaLaunch
from graphserve.runtime.triton_backend import SeveralLaunches
from tests.runtime.stub_cuda import StubCuda


class Graph:
    """A graph of torch, as far as it is read. Its nodes are gone when it is."""

    def __init__(self, cuda: StubCuda, nodes: list[Any]) -> None:
        self._cuda = cuda
        self._handle = 0x5000 + 0x100 * len(cuda.graphs)
        cuda.graphs[self._handle] = nodes

    def raw_cuda_graph(self) -> int:
        return self._handle

    def __del__(self) -> None:
        self._cuda.graphs[self._handle] = []


def test_nodes_are_named_by_function_by_library_kernel_or_by_type() -> None:
    cuda = StubCuda({})
    graph = Graph(cuda, ["rms_norm", b"gemm_splitk", "paged_attention", 2, 77])
    assert GraphReader(cuda).node_names(graph) == [
        "rms_norm", "gemm_splitk", "paged_attention", "<memory set>", "<type 77>",
    ]  # fmt: skip


def test_an_empty_graph_has_no_nodes() -> None:
    cuda = StubCuda({})
    assert GraphReader(cuda).node_names(Graph(cuda, [])) == []


def test_a_driver_that_refuses_is_named() -> None:
    cuda = StubCuda({})
    cuda.fail["cuGraphNodeGetType"] = 1
    with pytest.raises(DeviceError, match="cuGraphNodeGetType failed: CUDA_ERROR_INVALID_VALUE"):
        GraphReader(cuda).node_names(Graph(cuda, ["rms_norm"]))


class LibraryCall:
    def __init__(self, *nodes: Any) -> None:
        self.nodes = list(nodes)

    def __call__(self) -> None:
        pass


def kernel(name: str) -> CudaLaunch:
    launch = object.__new__(CudaLaunch)
    launch.name = name
    return launch


def nodes_of(action: Any, lost: str) -> list[Any]:
    if isinstance(action, LibraryCall):
        return action.nodes
    launches = action.launches if isinstance(action, SeveralLaunches) else [action]
    return [launch.name for launch in launches if launch.name != lost]


@pytest.mark.parametrize("lost", ["", "norm"])
def test_a_step_is_held_against_its_plan(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """Two kernels of ours in one launch, a product of one kernel and one of a memset and two kernels."""
    cuda = StubCuda({})

    def captured(actions: Iterable[Any], stream: object) -> Graph:
        return Graph(cuda, [node for action in actions for node in nodes_of(action, lost)])

    monkeypatch.setattr(graph_nodes, "captured", captured)
    actions: list[Any] = [kernel("norm"), LibraryCall(b"gemm"), SeveralLaunches([kernel("keys"), kernel("sum")])]
    actions += [LibraryCall(2, b"splitk", b"reduce"), kernel("norm")]
    launches = [(Launch("gs.linear.default", (), {}, (), layer=3), action) for action in actions]
    nodes = step_nodes(BoundPlan(launches, {}, ()), None, GraphReader(cuda))
    assert nodes.num_planned == 6
    assert nodes.extra == {"launch 3, gs.linear.default of layer 3": ["<memory set>", "splitk", "reduce"]}
    if lost:
        assert (nodes.num_captured, nodes.missing, nodes.num_unexplained) == (6, {"norm": 2}, -2)
    else:
        assert (nodes.num_captured, nodes.missing, nodes.num_unexplained) == (8, {}, 0)
