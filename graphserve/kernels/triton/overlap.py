"""Kernels that may start while the one in front of them still runs (programmatic dependent launch, sm_90 and later).

Only the time between two kernels is won: blocks of the next one are scheduled and stand ready when the last block of
this one ends. Every block waits before it reads or writes anything, blocks that have nothing to do too; what it waits
for includes the waits of the kernel in front, so all earlier kernels have ended and their results are visible.
"""

from __future__ import annotations

import hashlib

import msgspec

from graphserve.errors import ConfigError
from graphserve.kernels.triton.kernel import TritonKernel

OVERLAP_TARGETS = ("cuda:90", "cuda:100")
# Steps of up to so many tokens gain from it, larger ones lose: 4.00 for 4.17 ms at one sequence, the same at 16 and 64,
# 16.1 for 15.1 ms at 256 (H200, benchmarks/results/gpu_overlap_*.json). Not measured on the other target.
MAX_OVERLAP_TOKENS = 8
MEASURED_TARGETS = ("cuda:90",)

_FIRST_STATEMENTS = """\
    # Until the kernel in front has ended. Then the next one may be scheduled, which waits for this one in its turn.
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
"""


def overlapping(kernel: TritonKernel) -> TritonKernel:
    """The kernel with the wait in front of its statements: right with and without the launch attribute."""
    key = hashlib.sha256(f"{kernel.key}\n{_FIRST_STATEMENTS}".encode()).hexdigest()
    symbol = f"{kernel.symbol.rpartition('_')[0]}_{key[:16]}"
    head, entry, body = kernel.source.partition(f"def {kernel.symbol}(")
    signature, end, statements = body.partition("):\n")
    assert entry and end, f"{kernel.symbol} has no function of its name"
    source = f"{head.replace(kernel.key, key)}def {symbol}({signature}):\n{_FIRST_STATEMENTS}{statements}"
    return msgspec.structs.replace(kernel, symbol=symbol, key=key, source=source)


def require_overlap(target: str) -> None:
    """Refuse a target whose processors cannot start a kernel early.

    Raises:
        ConfigError: it is none of :data:`OVERLAP_TARGETS`.
    """
    if target not in OVERLAP_TARGETS:
        raise ConfigError(
            f"overlapping launches on {target}: only {', '.join(OVERLAP_TARGETS)} have them; launch without overlap"
        )
