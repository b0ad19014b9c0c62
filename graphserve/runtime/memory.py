"""Free memory of the machine or device that a model runs on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Host memory that can be taken without swapping, within the container's limit if there is one."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit, used = _read_int(cgroup / "memory.max"), _read_int(cgroup / "memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def device_memory(device: torch.device) -> tuple[int, int | None]:
    """Bytes that can be had now, and all bytes of the device (None for the host, which serves other programs too)."""
    if device.type == "cpu":
        return available_host_bytes(), None
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return free_bytes, total_bytes


def _read_int(path: Path) -> int | None:
    """The number in a one-line file; None if the file is absent or says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
