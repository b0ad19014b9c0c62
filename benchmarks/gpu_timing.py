"""Times of work on a CUDA device by its own events. Not yet run on a GPU."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

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
