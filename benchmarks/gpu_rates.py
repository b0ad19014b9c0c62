"""Rates of the device that torch reaches, to which others are compared."""

from __future__ import annotations

import torch

from benchmarks.gpu_timing import median_us
from graphserve.runtime.pinned_copies import PinnedCopies


def measure_rates() -> dict[str, float]:
    """Reading and copying 8 GB, a bf16 product, and weights on their way from the host."""
    read, copy = _memory_rates(1 << 31)
    torch.cuda.empty_cache()
    return {
        "read_gb_s": round(read),
        "copy_gb_s": round(copy),
        "bf16_mm_tflop_s": round(product_tflop_s(8192), 1),
        **_host_rates(1 << 28),
    }


def _memory_rates(num_floats: int) -> tuple[float, float]:
    """GB/s of a sum, and of a copy with reads and writes counted."""
    data = torch.ones(num_floats, dtype=torch.float32, device="cuda")
    copied = torch.empty_like(data)
    num_bytes = 4 * num_floats
    read_us = median_us(lambda: torch.sum(data), repeats=10)
    copy_us = median_us(lambda: copied.copy_(data), repeats=10)
    return num_bytes / read_us / 1e3, 2 * num_bytes / copy_us / 1e3


def _host_rates(num_bytes: int) -> dict[str, float]:
    """GB/s of a copy out of usual host memory, as torch makes it and through pinned buffers."""
    device = torch.device("cuda", torch.cuda.current_device())
    source, copies = torch.ones(num_bytes, dtype=torch.uint8), PinnedCopies(device)
    ways = {"host_to_device_gb_s": lambda: source.to(device), "host_to_device_pinned_gb_s": lambda: copies.copy(source)}
    return {name: round(num_bytes / median_us(way, repeats=8, warmup=2) / 1e3, 1) for name, way in ways.items()}


def product_tflop_s(size: int) -> float:
    """TFLOP/s of a square bf16 product of random numbers."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median_us(lambda: torch.mm(a, b, out=out), repeats=20) / 1e6
