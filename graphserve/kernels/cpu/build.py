"""Compiling generated kernels into shared libraries kept in a store, and loading them."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from graphserve.artifacts.difference import explain_miss
from graphserve.artifacts.store import Artifact, ArtifactStore
from graphserve.errors import CompileError
from graphserve.kernels.cpu.compiler import (
    COMMON_FLAGS,
    compile_command,
    compiler,
    compiler_version,
    openmp_runtime,
)
from graphserve.kernels.cpu.isa import ISA_LEVELS
from graphserve.kernels.cpu.kernel import CppKernel, template, translation_unit

logger = logging.getLogger(__name__)

MAX_COMPILE_JOBS = 2
LIBRARY_FILE, SOURCE_FILE = "library.so", "source.cpp"
Progress = Callable[[int, int, str], None]  # libraries done, libraries in all, name

_VERSION = re.compile(r"\d+(\.\d+)+")


class Library:
    """Loaded kernels. Invariant: every symbol asked for was built from the kernels given to :func:`build`.

    Attributes:
        misses: one phrase for each library that was not taken from the store.
    """

    def __init__(self, paths: list[Path], handles: list[ctypes.CDLL], misses: list[str]) -> None:
        self.paths = paths
        self.misses = misses
        self._handles = handles

    def function_pointer(self, symbol: str) -> int:
        """Address of a kernel.

        Raises:
            KeyError: no library holds the symbol.
        """
        for handle in self._handles:
            function = getattr(handle, symbol, None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p).value or 0
        raise KeyError(f"kernel {symbol} is in none of the loaded libraries: {', '.join(map(str, self.paths))}")


def build(
    kernels: list[CppKernel], store: ArtifactStore, progress: Progress | None = None, num_jobs: int = MAX_COMPILE_JOBS
) -> Library:
    """Compile what the store lacks and load all of it.

    Kernels are grouped by ISA level and template family, one library a group. A library in the store is used as it is
    unless another compiler version is at hand and the store can be written; it needs no compiler.

    Args:
        kernels: kernels to build; repeated keys are built once.
        progress: called after each library with (done, total, name).
        num_jobs: compilers that run at a time.

    Raises:
        CompileError: a needed library is missing and there is no compiler, or the compiler failed.
        CacheMissError: a needed library is missing and the store is strict.
    """
    units = _units(kernels)
    loaded: list[tuple[Path, ctypes.CDLL]] = []
    with ThreadPoolExecutor(num_jobs) as pool:
        for done, pair in enumerate(pool.map(lambda unit: unit.load(store), units), start=1):
            loaded.append(pair)
            if progress is not None:
                progress(done, len(units), units[done - 1].name)
    misses = [unit.miss for unit in units if unit.miss]
    return Library([path for path, _ in loaded], [handle for _, handle in loaded], misses)


def compile_missing(
    kernels: list[CppKernel],
    store: ArtifactStore,
    progress: Progress | None = None,
    num_jobs: int = MAX_COMPILE_JOBS,
    is_stopped: Callable[[], bool] = lambda: False,
    niceness: int = 0,
) -> None:
    """As :func:`build`, loading nothing: the libraries may be for an ISA level that this processor lacks.

    Args:
        is_stopped: asked before each library; those that are left then are not built.
        niceness: added to that of the compilers, so that other work goes first.
    """
    units = _units(kernels)

    def ensure(unit: _Unit) -> None:
        if not is_stopped():
            unit.ensure(store)

    def lower_priority() -> None:
        # On Linux a thread has a niceness of its own, which the processes that it starts inherit.
        if niceness and hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)

    with ThreadPoolExecutor(num_jobs, initializer=lower_priority) as pool:
        for done, _ in enumerate(pool.map(ensure, units), start=1):
            if progress is not None:
                progress(done, len(units), units[done - 1].name)


def stored_libraries(kernels: list[CppKernel], store: ArtifactStore) -> dict[str, Artifact | None]:
    """The libraries that :func:`build` needs by name, None for those that it would have to compile."""
    return {unit.name: unit.find(store) for unit in _units(kernels)}


def missing_libraries(kernels: list[CppKernel], store: ArtifactStore) -> list[str]:
    """Names of the libraries that :func:`build` would have to compile for ``kernels``. Compiles nothing."""
    return [name for name, artifact in stored_libraries(kernels, store).items() if artifact is None]


def _units(kernels: list[CppKernel]) -> list[_Unit]:
    openmp = openmp_runtime()
    groups: dict[tuple[str, tuple[str, ...]], dict[str, CppKernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.isa, kernel.families), {})[kernel.key] = kernel
    units = []
    for (isa, families), group in sorted(groups.items()):
        members = [group[key] for key in sorted(group)]
        family = "+".join(families[1:])
        name = f"{family} ({isa}, {len(members)} kernels)"
        units.append(_Unit(name, family, isa, translation_unit(members), ISA_LEVELS[isa].compiler_flags, openmp))
    return [*units, _Unit("sequence", "sequence", "generic", template("sequence"), (), None)]


class _Unit:
    """One shared library: its source, and what else decides its contents."""

    def __init__(
        self, name: str, family: str, isa: str, source: str, flags: tuple[str, ...], openmp: Path | None
    ) -> None:
        self.name, self.miss = name, ""
        self._source, self._flags, self._openmp = source, flags, openmp
        self.factors: dict[str, Any] = {
            "family": family,
            "isa": isa,
            "source": hashlib.sha256(source.encode()).hexdigest(),
            "flags": [*COMMON_FLAGS, *flags],
            "OpenMP runtime": openmp.name if openmp is not None else None,
        }

    def find(self, store: ArtifactStore) -> Artifact | None:
        """The library in the store, unless it has to be built again; ``miss`` says why."""
        artifact = store.find("cpp", self.factors)
        if artifact is None:
            self.miss = explain_miss(store, "cpp", self.factors, same=("family", "isa"))
            return None
        made_by, at_hand = artifact.manifest.built.get("C++ compiler"), compiler_version()
        # The compiler's version decides building, not loading: where nothing can be built, any version will do.
        if at_hand in (None, made_by) or not store.is_writable or store.is_strict:
            self.miss = ""
            return artifact
        self.miss = f"miss: C++ compiler {_short(made_by)} → {_short(at_hand)}"
        return None

    def ensure(self, store: ArtifactStore) -> Artifact:
        """The library in the store, built if need be."""
        artifact = self.find(store)
        if artifact is not None:
            return artifact
        if compiler() is None and not store.is_strict:
            raise CompileError(
                f"kernel library {self.name} is not in the store {store.root} and no C++ compiler was found:"
                " install g++ or clang++, or point $CXX at one"
            )
        with store.lock("cpp", self.factors):
            miss = self.miss
            artifact = self.find(store)  # another process may have built it while this one waited
            if artifact is not None:
                return artifact
            self.miss = miss
            store.begin_build(f"kernel library {self.name}")
            return self._compile(store)

    def load(self, store: ArtifactStore) -> tuple[Path, ctypes.CDLL]:
        """The library, loaded; one that the linker refuses (made for another C library, say) is built again."""
        artifact = self.ensure(store)
        path = artifact.path(LIBRARY_FILE)
        try:
            return path, ctypes.CDLL(str(path))
        except OSError as error:
            store.quarantine(artifact.folder, f"{LIBRARY_FILE}: {error}")
            path = self.ensure(store).path(LIBRARY_FILE)
            try:
                return path, ctypes.CDLL(str(path))
            except OSError as again:
                raise CompileError(f"kernel library {self.name} cannot be loaded: {again}") from again

    def _compile(self, store: ArtifactStore) -> Artifact:
        begin = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="graphserve-cpp-") as folder:
                source, built = Path(folder, SOURCE_FILE), Path(folder, LIBRARY_FILE)
                source.write_text(self._source)
                # A relative name: the folder must not show in the library.
                command = compile_command(Path(source.name), Path(built.name), self._flags, self._openmp)
                result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
                if result.returncode != 0:
                    raise CompileError(f"compiling {self.name} failed: {' '.join(command)}\n{result.stderr[-4000:]}")
                files = {SOURCE_FILE: self._source.encode(), LIBRARY_FILE: built.read_bytes()}
            facts = {"C++ compiler": compiler_version(), "seconds": round(time.monotonic() - begin, 3)}
            return store.put("cpp", self.factors, files, self.name, facts)
        except OSError as error:
            raise CompileError(f"kernel library {self.name} could not be built or stored: {error}") from error


def _short(version: str | None) -> str:
    """``12.2.0`` of ``g++ (Debian 12.2.0-14) 12.2.0``."""
    found = list(_VERSION.finditer(version or ""))
    return found[-1].group() if found else str(version)
