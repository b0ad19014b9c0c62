"""The processors: what they are, and how many of them and of their threads this process may use."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_threads() -> int:
    """Threads that torch uses, but no more than there are processors for.

    Threads of a step wait for one another between kernels; with more of them than processors, each wait may last as
    long as the scheduler lets another one run.
    """
    import torch

    return min(torch.get_num_threads(), available_processors())


@cache
def available_processors() -> int:
    """Processors that the process is bound to, but no more than its container's share of processor time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = granted_processors()
    return bound if granted is None else min(bound, granted)


def granted_processors(cgroup: Path = _CGROUP) -> int | None:
    """Processors' worth of time that the control group grants, rounded up; None without a limit.

    Args:
        cgroup: mount point, of version 2 (``cpu.max``) or 1 (``cpu/cpu.cfs_quota_us``).
    """
    words = _read(cgroup / "cpu.max").split()
    if len(words) != 2:
        words = [_read(cgroup / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    if not all(word.isdigit() and int(word) > 0 for word in words):  # "max", "-1", or nothing
        return None
    quota, period = map(int, words)
    return -(-quota // period)


def processor_name() -> str:
    """What the processor calls itself, or its architecture."""
    return processor_facts().get("model name") or platform.machine()


@cache
def processor_facts() -> dict[str, str]:
    """What Linux says of the first processor, by the names in ``/proc/cpuinfo``; nothing elsewhere."""
    first = _read(Path("/proc/cpuinfo")).partition("\n\n")[0]
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def use_one_blas_thread() -> None:
    """Called in a process of ours before numpy is imported: its BLAS, which nothing here uses, makes no threads.

    They would wait by spinning, beside imports. torch has another BLAS on x86-64; elsewhere it may be the same.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
