"""Instruction set levels of the generated kernels and how the processor's level is found."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class IsaLevel:
    """One level: vector width in fp32 lanes, what it needs from the processor, and the compiler's flags."""

    name: str
    width: int
    dot_bf16: bool
    cpu_flags: frozenset[str]  # names as in /proc/cpuinfo
    compiler_flags: tuple[str, ...]


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512_FLAGS = (*(f"-m{name}" for name in _AVX512), "-mavx2", "-mfma", "-mprefer-vector-width=512")

# Best first: the first level the processor has is taken.
ISA_LEVELS: dict[str, IsaLevel] = {
    level.name: level
    for level in (
        IsaLevel(
            "avx512-bf16", 16, True, frozenset((*_AVX512, "avx512_bf16", "fma")), (*_AVX512_FLAGS, "-mavx512bf16")
        ),
        IsaLevel("avx512", 16, False, frozenset((*_AVX512, "fma")), _AVX512_FLAGS),
        IsaLevel("avx2", 8, False, frozenset(("avx2", "fma")), ("-mavx2", "-mfma")),
        IsaLevel("generic", 4, False, frozenset(), ()),
    )
}

ISA_VARIABLE = "GRAPHSERVE_CPU_ISA"


@cache
def _cpu_flags() -> frozenset[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


def available_levels() -> list[str]:
    """Levels this processor can run, best first; ``generic`` is always among them."""
    return [name for name, level in ISA_LEVELS.items() if level.cpu_flags <= _cpu_flags()]


def isa_level() -> str:
    """The level kernels are generated for: the best available, or ``GRAPHSERVE_CPU_ISA``.

    Raises:
        ValueError: the variable names a level that is unknown or that this processor lacks.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    levels = available_levels()
    if wanted is None:
        return levels[0]
    if wanted not in levels:
        raise ValueError(f"{ISA_VARIABLE}={wanted} is not available here: use one of {', '.join(levels)}")
    return wanted
