"""What a captured CUDA graph consists of, read from the driver: for tests and measurements."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable
from ctypes import POINTER, Structure, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import NamedTuple

import torch

from graphserve.plan.runner import Action, BoundPlan
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.cuda_launcher import CudaLaunch
from graphserve.runtime.triton_backend import SeveralLaunches

KERNEL = 0  # CUgraphNodeType
_OTHER_TYPES = {1: "memory copy", 2: "memory set", 3: "host function", 4: "child graph", 5: "empty"}


class KernelNodeParameters(Structure):
    """``CUDA_KERNEL_NODE_PARAMS_v2``: a kernel is named by its function, or where that is null by ``kernel``."""

    _fields_ = [
        ("function", c_void_p),
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("parameters", c_void_p),
        ("extra", c_void_p),
        ("kernel", c_void_p),
        ("context", c_void_p),
    ]


_FUNCTIONS = {
    "cuGraphGetNodes": (c_void_p, POINTER(c_void_p), POINTER(c_size_t)),
    "cuGraphNodeGetType": (c_void_p, POINTER(c_int)),
    "cuGraphKernelNodeGetParams_v2": (c_void_p, POINTER(KernelNodeParameters)),
    "cuFuncGetName": (POINTER(c_char_p), c_void_p),
    "cuKernelGetName": (POINTER(c_char_p), c_void_p),
}


class GraphReader:
    """Reads graphs that torch captured with ``keep_graph=True``.

    Args:
        library: the driver, by default the system's. It must be that of CUDA 12.3 or later.
    """

    def __init__(self, library: object = None) -> None:
        self._driver = CudaDriver(library, _FUNCTIONS)

    def node_names(self, graph: torch.cuda.CUDAGraph) -> list[str]:
        """The name of each kernel of a graph; of a node that is no kernel its type in angle brackets."""
        handle, count = graph.raw_cuda_graph(), c_size_t()
        self._driver.call("cuGraphGetNodes", handle, None, ctypes.byref(count))
        nodes = (c_void_p * count.value)()
        self._driver.call("cuGraphGetNodes", handle, nodes, ctypes.byref(count))
        return [self._name(node) for node in nodes if node]

    def _name(self, node: int) -> str:
        kind = c_int()
        self._driver.call("cuGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value != KERNEL:
            return f"<{_OTHER_TYPES.get(kind.value, f'type {kind.value}')}>"
        parameters = KernelNodeParameters()
        self._driver.call("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(parameters))
        name = c_char_p()
        if parameters.function:
            self._driver.call("cuFuncGetName", ctypes.byref(name), parameters.function)
        else:
            self._driver.call("cuKernelGetName", ctypes.byref(name), parameters.kernel)
        return name.value.decode() if name.value else "<kernel without a name>"


class StepNodes(NamedTuple):
    """A step's graph beside its plan.

    Attributes:
        num_planned: kernels that the plan's launches start, and library calls, each taken for one kernel.
        num_captured: nodes of the graph.
        extra: library call → its nodes, for those that have not exactly one; each is captured by itself.
        missing: generated kernels of the plan that the graph has fewer of.
    """

    num_planned: int
    num_captured: int
    extra: dict[str, list[str]]
    missing: dict[str, int]

    @property
    def num_unexplained(self) -> int:
        """Nodes that are neither planned nor listed in ``extra``."""
        return self.num_captured - self.num_planned - sum(len(nodes) - 1 for nodes in self.extra.values())


def step_nodes(bound: BoundPlan, stream: torch.cuda.Stream, reader: GraphReader) -> StepNodes:
    """Capture a step's launches, which were made before, and compare the graph with them."""
    planned: Counter[str] = Counter()
    num_calls = 0
    extra: dict[str, list[str]] = {}
    for place, (launch, action) in enumerate(bound.launches):
        names = _kernel_names(action)
        planned.update(names)
        if not names:
            num_calls += 1
            alone = reader.node_names(captured([action], stream))
            if len(alone) != 1:
                extra[f"launch {place}, {launch.op} of layer {launch.layer}"] = alone
    nodes = reader.node_names(captured([action for _, action in bound.launches], stream))
    return StepNodes(planned.total() + num_calls, len(nodes), extra, dict(planned - Counter(nodes)))


def _kernel_names(action: Action) -> list[str]:
    """The generated kernels that an action starts; none for a library call."""
    if isinstance(action, CudaLaunch):
        return [action.name]
    return [launch.name for launch in action.launches] if isinstance(action, SeveralLaunches) else []


def captured(actions: Iterable[Callable[[], object]], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of actions that were made before, which stays readable; nothing runs."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.inference_mode(), torch.cuda.stream(stream):
        torch.cuda.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for action in actions:
                action()
        finally:
            graph.capture_end()
    return graph
