"""Reading a captured graph's nodes, against the stand-in for the driver."""

from __future__ import annotations

import pytest

from graphserve.errors import DeviceError
from graphserve.runtime.graph_nodes import GraphReader
from tests.runtime.stub_cuda import StubCuda

GRAPH = 0x5000


def test_nodes_are_named_by_function_by_library_kernel_or_by_type() -> None:
    cuda = StubCuda({})
    cuda.graphs[GRAPH] = ["rms_norm", b"gemm_splitk", "paged_attention", 2, 77]
    assert GraphReader(cuda).node_names(GRAPH) == [
        "rms_norm", "gemm_splitk", "paged_attention", "<memory set>", "<type 77>",
    ]  # fmt: skip


def test_an_empty_graph_has_no_nodes() -> None:
    cuda = StubCuda({})
    cuda.graphs[GRAPH] = []
    assert GraphReader(cuda).node_names(GRAPH) == []


def test_a_driver_that_refuses_is_named() -> None:
    cuda = StubCuda({})
    cuda.graphs[GRAPH] = ["rms_norm"]
    cuda.fail["cuGraphNodeGetType"] = 1
    with pytest.raises(DeviceError, match="cuGraphNodeGetType failed: CUDA_ERROR_INVALID_VALUE"):
        GraphReader(cuda).node_names(GRAPH)
