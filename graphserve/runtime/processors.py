"""How many threads generated C++ may run on."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def usable_threads() -> int:
    """Threads that torch uses, but no more than the container's share of processor time.

    Threads of a step wait for one another between kernels; with more of them than processors, each wait may last as
    long as the scheduler lets another one run.
    """
    granted = _granted()
    most = torch.get_num_threads()
    return most if granted is None else min(granted, most)


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


@cache
def _granted() -> int | None:
    return granted_processors()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
