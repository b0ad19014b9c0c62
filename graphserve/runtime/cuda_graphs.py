"""Steps as CUDA graphs: each sequence of launches is captured once and replayed with one call.

All graphs share one memory pool, since they never run at the same time. Python's garbage collector is off during a
capture: an object that it would free could call the driver in the middle. A capture does no work on the device; the
launches are made once before it, so that libraries have made their handles and workspaces.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from graphserve.plan.runner import StepSize
from graphserve.runtime.step_graphs import GraphKey, Recording

logger = logging.getLogger(__name__)


class CudaGraphs:
    """Captured steps by key. See :class:`~graphserve.runtime.step_graphs.StepGraphs`.

    Captures and replays happen on the stream that is current, which must not be the default one.

    Args:
        cuda: ``torch.cuda``, or what stands in for it in tests.

    Attributes:
        num_bytes: device memory that the graphs took, measured with everything else in place.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._pool = cuda.graph_pool_handle()
        self._graphs: dict[GraphKey, _Captured] = {}
        self._too_large: StepSize | None = None
        self.num_bytes = 0

    def __contains__(self, key: GraphKey) -> bool:
        return key in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)

    def record(self, key: GraphKey, recording: Recording) -> bool:
        """Make the launches once, then capture them.

        Returns:
            False if the device has no memory for the graph, which the log says once; larger sizes then launch eagerly.
        """
        if self._too_large is not None and key.size >= self._too_large:
            return False
        graph = self._cuda.CUDAGraph()
        free_before = self._cuda.mem_get_info()[0]
        try:
            for _, action in recording.launches:
                action()
            self._cuda.current_stream().synchronize()
            with _no_garbage_collection(), self._capture(graph):
                for _, action in recording.launches:
                    action()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            self._too_large = key.size
            logger.warning(
                "no memory to capture a graph for %d tokens, %d rows and %d sequences: steps of this size and larger "
                "ones launch eagerly, which is slower (lower max_num_seqs or gpu_memory_utilization)",
                *key.size,
            )
            return False
        self._graphs[key] = _Captured(graph, recording)
        self.num_bytes += max(0, free_before - self._cuda.mem_get_info()[0])
        return True

    def replay(self, key: GraphKey) -> None:
        """Launch the graph on the current stream."""
        self._graphs[key].graph.replay()

    def close(self) -> None:
        """Destroy all graphs; none may be running. Others can be recorded afterwards."""
        for captured in self._graphs.values():
            captured.graph.reset()
        self._graphs.clear()
        # torch refuses a pool whose last graph is gone.
        self._pool = self._cuda.graph_pool_handle()
        self._too_large = None
        self.num_bytes = 0

    @contextmanager
    def _capture(self, graph: Any) -> Iterator[None]:
        # Other threads (a tokenizer's, say) may call the driver meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            # The stream must leave capture mode; the failure that made the graph useless is the one to report.
            try:
                graph.capture_end()
            except RuntimeError as error:
                logger.debug("ending a failed capture: %s", error)
            raise
        graph.capture_end()


class _Captured(NamedTuple):
    """A graph, and what it points into: nothing of it may be freed before the graph."""

    graph: Any
    recording: Recording


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_out_of_memory(error: RuntimeError) -> bool:
    # torch's own error, or a plain one with the driver's words where the driver lacks memory for the graph itself.
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
