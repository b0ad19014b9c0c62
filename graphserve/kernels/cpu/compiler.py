"""The C++ compiler and the OpenMP runtime that generated kernels are built with."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from itertools import dropwhile
from pathlib import Path

from graphserve.errors import ConfigError
from graphserve.processors import processor_name

logger = logging.getLogger(__name__)

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

_NAMES = ("g++", "clang++", "c++")  # looked for on PATH, in this order

# Runtimes that export the GOMP_* entry points the kernels call.
_OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that runs.

    Attributes:
        command: the program's path and, if it is $CXX, the words after it.
        version: the first line of what the whole command answers to ``--version``, so that of the compiler and not of
            a wrapper such as ccache. It holds no path.
    """

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler | None:
    """$CXX if it is set, else the first of g++, clang++ and c++ on PATH that runs; None if there is none.

    Raises:
        ConfigError: $CXX is set and does not run. As in torch.compile, nothing else is taken in its place: whoever sets
            it has a reason.
    """
    chosen = _chosen()
    if not chosen:
        tried = (_try([name]) for name in _NAMES)
        return next((found for found in tried if isinstance(found, Compiler)), None)
    found = _try(chosen)
    if isinstance(found, str):
        raise ConfigError(
            f"CXX={os.environ['CXX']!r} is no C++ compiler that runs ({found}): set it to one that answers --version, "
            f"or unset it to have the first of {', '.join(_NAMES)} taken from PATH"
        )
    return found


def compiler() -> str | None:
    """Path and version of the C++ compiler, or None if there is none; raises as :func:`find_compiler` does."""
    found = find_compiler()
    return None if found is None else f"{found.command[0]} ({found.version})"


def compiler_version() -> str | None:
    """The version of the compiler that can build here, a key factor; None if none can.

    A $CXX that does not run is no error here: what is stored is loaded without a compiler.
    """
    try:
        found = find_compiler()
    except ConfigError:
        return None
    return None if found is None else found.version


def compiler_options() -> list[str]:
    """What $CXX adds to every compilation, a key factor: its words from the first option on.

    The words before name the compiler, whose version is a factor, or a wrapper such as ccache, which changes no result.
    """
    options = list(dropwhile(lambda word: not word.startswith("-"), _chosen()))
    if any(option.endswith("=native") for option in options):
        options.append(processor_name())  # what they mean depends on it
    return options


def _chosen() -> list[str]:
    """The words of $CXX; none if it is not set.

    Raises:
        ConfigError: a quote in it is not closed.
    """
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"CXX={text!r} cannot be split into words ({error}): close the quote or unset it") from None


def _try(words: list[str]) -> Compiler | str:
    """The compiler that a command runs, or why it is none."""
    program = shutil.which(words[0])
    if program is None:
        return f"{words[0] or 'an empty name'} is not there or not executable"
    # Absolute: it is run in another folder.
    return _ask((os.path.abspath(program), *words[1:]))


@cache
def _ask(command: tuple[str, ...]) -> Compiler | str:
    reason = ""
    try:
        result = subprocess.run(
            [*command, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
        if result.returncode != 0:
            reason = f"--version ends with status {result.returncode}: {result.stderr.strip()[-500:]}"
    except OSError as error:
        reason = str(error)
    if reason:
        logger.warning("%s cannot be used: %s", shlex.join(command), reason)
        return reason
    lines = result.stdout.splitlines()
    return Compiler(command, lines[0].strip() if lines else "unknown version")


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
    """The command line that turns one generated file into a shared library; there must be a compiler."""
    found = find_compiler()
    assert found is not None
    link = [str(openmp)] if openmp is not None else []
    define = f"-DGS_OPENMP={int(openmp is not None)}"
    return [*found.command, *COMMON_FLAGS, *isa_flags, define, "-o", str(output), str(source), *link]
