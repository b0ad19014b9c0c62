"""Times of work on a CUDA device by its own events."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

import torch

_FLUSH_BYTES = 512 << 20  # more than any L2 cache


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def median_us(work: Callable[[], object], repeats: int = 30, warmup: int = 5) -> float:
    """Median microseconds of ``work`` on the current stream, the L2 cache cold.

    Overwriting the buffer keeps the device busy while the host enqueues, so that the host's own time does not count as
    long as enqueuing ``work`` is the shorter of the two.
    """
    for _ in range(warmup):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        _flush_buffer().zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """The stream on which :func:`graph_us` captures; launches with a stream of their own must be bound to it."""
    return torch.cuda.Stream()


def graph_us(works: Sequence[Callable[[], object]], launches: int = 16, repeats: int = 20) -> float:
    """Median microseconds of one of ``works``, replayed from a graph that runs them in turn, as a step's kernels run.

    Args:
        works: the same work over different memory, together more than the L2 cache holds.
        launches: at least so many in the graph, so that what a replay itself takes does not count.
    """
    rounds = -(-launches // len(works))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()  # tensors may have been filled on another stream
    with torch.cuda.stream(capture_stream()):
        for work in works:
            work()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=capture_stream()):
            for _ in range(rounds):
                for work in works:
                    work()
        return median_us(graph.replay, repeats, warmup=2) / (rounds * len(works))
