"""The C++ compiler and the OpenMP runtime that generated kernels are built with."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

COMMON_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a * b + c becomes one fma
    "-fno-math-errno",
    "-fno-trapping-math",
)

# Runtimes that export the GOMP_* entry points the kernels call.
_OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")


def _command() -> list[str] | None:
    """The first usable of $CXX, g++, clang++ and c++, with the arguments $CXX carries."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        words = shlex.split(candidate) if candidate else []
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return [path, *words[1:]]
    return None


@cache
def _version(path: str) -> str:
    result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    return lines[0].strip() if lines else "unknown version"


def compiler() -> str | None:
    """Path and version of the C++ compiler, or None when $CXX, g++, clang++ and c++ are all missing from PATH."""
    command = _command()
    return None if command is None else f"{command[0]} ({_version(command[0])})"


def compiler_version() -> str | None:
    """The compiler's version line without its path: a key factor of building."""
    command = _command()
    return None if command is None else _version(command[0])


def openmp_runtime() -> Path | None:
    """The OpenMP library that torch has loaded, or None; kernels link against that very file.

    Other packages (sentencepiece, say) may have loaded one of their own, with threads of its own.
    """
    import torch  # loads the runtime

    package = Path(torch.__file__).parent

    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if line.count("/") and ".so" in line)
    found = [Path(path) for path in paths if Path(path).name.startswith(_OPENMP_NAMES)]
    of_torch = [p for p in found if package in p.parents or p.parent.name == "torch.libs"]
    return next(iter([*of_torch, *found]), None)


def compile_command(source: Path, output: Path, isa_flags: tuple[str, ...], openmp: Path | None) -> list[str]:
    """The command line that turns one generated file into a shared library.

    Raises:
        RuntimeError: no compiler is on PATH.
    """
    command = _command()
    if command is None:
        raise RuntimeError("no C++ compiler found: install g++ or clang++, or point $CXX at one")
    link = [str(openmp)] if openmp is not None else []
    define = f"-DGS_OPENMP={int(openmp is not None)}"
    return [*command, *COMMON_FLAGS, *isa_flags, define, "-o", str(output), str(source), *link]
