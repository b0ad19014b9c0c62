"""Instruction set levels of the generated kernels and how the processor's level is found."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

from graphserve.errors import ConfigError
from graphserve.processors import processor_facts


@dataclass(frozen=True)
class IsaLevel:
    """One level: vector width in fp32 lanes, what it needs from the processor, and the compiler's flags.

    A level that needs anything is one of x86-64.
    """

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

_SAME_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}


def machine() -> str:
    """The processor's architecture, by one name on every system: ``x86_64``, ``aarch64``."""
    name = platform.machine().lower()
    return _SAME_MACHINE.get(name, name)


def available_levels() -> list[str]:
    """Levels this processor can run, best first; ``generic`` is always among them."""
    flags = frozenset(processor_facts().get("flags", "").split())
    return [name for name in compilable_levels() if ISA_LEVELS[name].cpu_flags <= flags]


def compilable_levels() -> list[str]:
    """Levels that a compiler for this machine has code for, whether or not the processor can run it; best first."""
    return [name for name, level in ISA_LEVELS.items() if not level.cpu_flags or machine() == "x86_64"]


def check_compilable(level: str) -> None:
    """Refuse a level that no compiler for this machine has code for.

    Raises:
        ConfigError: with the levels that it has code for.
    """
    if level not in compilable_levels():
        raise ConfigError(
            f"kernels for {level} cannot be compiled on a {machine()} machine: use {', '.join(compilable_levels())}, "
            "or compile on an x86_64 machine"
        )


def isa_level() -> str:
    """The level kernels are generated for: the best available, or ``GRAPHSERVE_CPU_ISA``.

    Raises:
        ConfigError: the variable names a level that is unknown or that this processor lacks.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    levels = available_levels()
    if wanted is None:
        return levels[0]
    if wanted not in levels:
        raise ConfigError(f"{ISA_VARIABLE}={wanted} is not available here: use one of {', '.join(levels)}")
    return wanted
