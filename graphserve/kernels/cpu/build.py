"""Compiling generated kernels into shared libraries kept in a store, and loading them."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import queue
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from graphserve.artifacts.difference import explain_miss
from graphserve.artifacts.manifest import SECONDS, artifact_key
from graphserve.artifacts.store import Artifact, ArtifactStore
from graphserve.errors import CacheMissError, CompileError
from graphserve.kernels.cpu.compiler import (
    COMMON_FLAGS,
    compile_command,
    compiler_options,
    compiler_version,
    find_compiler,
    openmp_runtime,
)
from graphserve.kernels.cpu.isa import ISA_LEVELS, check_compilable, machine
from graphserve.kernels.cpu.kernel import CppKernel, template, translation_unit

logger = logging.getLogger(__name__)

MAX_COMPILE_JOBS = 2
KIND, LIBRARY_FILE, SOURCE_FILE = "cpp", "library.so", "source.cpp"
COMPILER = "C++ compiler"  # the factor in which a library may differ where none can be built
Progress = Callable[[int, int, str], None]  # libraries done, libraries in all, name
Result = TypeVar("Result")

_VERSION, _PARENTHESES = re.compile(r"\d+(\.\d+)+"), re.compile(r"\([^)]*\)")


class Library:
    """Loaded kernels. Invariant: what :func:`build` gives has every symbol of its kernels.

    Attributes:
        misses: one phrase for each library that was not taken from the store.
    """

    def __init__(self, paths: list[Path], handles: list[ctypes.CDLL], misses: list[str]) -> None:
        self.paths = paths
        self.misses = misses
        self._handles = handles

    @property
    def reasons(self) -> str:
        """The different ones of ``misses``, for people."""
        return ", ".join(dict.fromkeys(self.misses))

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
    kernels: list[CppKernel],
    store: ArtifactStore,
    progress: Progress | None = None,
    num_jobs: int = MAX_COMPILE_JOBS,
    is_stopped: Callable[[], bool] = lambda: False,
    niceness: int = 0,
    any_compiler: bool = False,
) -> Library:
    """Compile what the store lacks and load all of it.

    Kernels are grouped by ISA level and template family, one library a group. What is in the store needs no compiler.
    Libraries of several compilers may be there: that of the compiler at hand is used, and built if it lacks. Without a
    compiler, or with a store that is strict or cannot be written, that of another compiler is used.

    Args:
        kernels: kernels to build; repeated keys are built once.
        progress: called after each library with (done, total, name), in the order of the libraries.
        num_jobs: compilers that run at a time.
        is_stopped: asked before each library; those that are left then are not built.
        niceness: added to that of the compilers, so that other work goes first.
        any_compiler: a stored library of another compiler will do, although one could be built.

    Raises:
        CompileError: a library must be built and there is no compiler, or the compiler failed; or what it built cannot
            be loaded; or it was stopped.
        CacheMissError: a library is missing or cannot be loaded, and the store is strict.
        ConfigError: a library must be built and $CXX does not run; or a level is one of another kind of machine.
    """
    units = _units(kernels, any_compiler)

    def load(unit: _Unit) -> tuple[Path, ctypes.CDLL]:
        if is_stopped():
            raise CompileError("the build was stopped")
        return unit.load(store)

    loaded = _each(units, load, progress, num_jobs, niceness)
    misses = [unit.miss for unit in units if unit.miss]
    return Library([path for path, _ in loaded], [handle for _, handle in loaded], misses)


def compile_missing(
    kernels: list[CppKernel],
    store: ArtifactStore,
    progress: Progress | None = None,
    num_jobs: int = MAX_COMPILE_JOBS,
) -> None:
    """As :func:`build`, loading nothing: the libraries may be for an ISA level that this processor lacks."""
    _each(_units(kernels), lambda unit: unit.ensure(store), progress, num_jobs)


def load_stored(kernels: list[CppKernel], store: ArtifactStore) -> Library:
    """Load what is stored, whatever compiler made it; ``misses`` says of each other library why. Compiles nothing."""
    loaded: list[tuple[Path, ctypes.CDLL]] = []
    misses: list[str] = []
    for unit in _units(kernels, any_compiler=True):
        found = unit.find(store)
        try:
            if isinstance(found, str):
                misses.append(found)
            else:
                loaded.append(_load(found))
        except OSError as error:
            misses.append(f"the stored one cannot be loaded: {error}")
    return Library([path for path, _ in loaded], [handle for _, handle in loaded], misses)


def _each(
    units: list[_Unit],
    act: Callable[[_Unit], Result],
    progress: Progress | None,
    num_jobs: int,
    niceness: int = 0,
) -> list[Result]:
    """What ``act`` gives for each library, in their order, some at a time. After one that fails none is begun."""
    results = [Future[Result]() for _ in units]
    waiting: queue.SimpleQueue[tuple[_Unit, Future[Result]]] = queue.SimpleQueue()
    for pair in zip(units, results, strict=True):
        waiting.put(pair)

    def work() -> None:
        _lower_priority(niceness)
        while True:
            try:
                unit, result = waiting.get_nowait()
            except queue.Empty:
                return
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(act(unit))
                except BaseException as error:
                    for later in results:
                        later.cancel()
                    result.set_exception(error)

    # Daemons, unlike those of a pool: a script that ends does not wait for what is compiled in its background.
    for _ in units[:num_jobs]:
        threading.Thread(target=work, name="C++ compiler", daemon=True).start()
    try:
        for done, (unit, result) in enumerate(zip(units, results, strict=True), start=1):
            result.result()
            if progress is not None:
                progress(done, len(units), unit.name)
    finally:
        for result in results:
            result.cancel()
        wait(results)
    return [result.result() for result in results]


def _lower_priority(niceness: int) -> None:
    """Make this thread nicer. On Linux it has a niceness of its own, which the processes that it starts inherit."""
    if niceness and hasattr(os, "setpriority"):
        thread = threading.get_native_id()
        with suppress(OSError):  # some sandboxes allow neither; then it competes like all else
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + niceness))


def stored_libraries(kernels: list[CppKernel], store: ArtifactStore) -> dict[str, Artifact | str]:
    """The libraries that :func:`build` needs by name; of those that it would have to compile, why."""
    return {unit.name: unit.find(store) for unit in _units(kernels)}


def _units(kernels: list[CppKernel], any_compiler: bool = False) -> list[_Unit]:
    openmp = openmp_runtime()
    groups: dict[tuple[str, tuple[str, ...]], dict[str, CppKernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.isa, kernel.families), {})[kernel.key] = kernel
    units = []
    for (isa, families), group in sorted(groups.items()):
        check_compilable(isa)
        members = [group[key] for key in sorted(group)]
        family = "+".join(families[1:])
        name = f"{family} ({isa}, {len(members)} kernels)"
        units.append(_Unit(name, family, isa, translation_unit(members), ISA_LEVELS[isa].compiler_flags, openmp))
    units.append(_Unit("sequence", "sequence", "generic", template("sequence"), (), None))
    for unit in units:
        unit.any_compiler = any_compiler
    return units


class _Unit:
    """One shared library: its source, and what else decides its contents.

    Attributes:
        factors: what the store knows it by.
        miss: why this process has built it; empty if it has not.
        any_compiler: a stored one of another compiler will do.
    """

    def __init__(
        self, name: str, family: str, isa: str, source: str, flags: tuple[str, ...], openmp: Path | None
    ) -> None:
        self.name, self.miss, self.any_compiler = name, "", False
        self._source, self._flags, self._openmp = source, flags, openmp
        self.factors: dict[str, Any] = {
            "family": family,
            "isa": isa,
            "source": hashlib.sha256(source.encode()).hexdigest(),
            "flags": [*COMMON_FLAGS, *flags],
            "OpenMP runtime": openmp.name if openmp is not None else None,
            "machine": machine(),
            "system": platform.system(),
            # Not part of the compiler: what -march=native made, say, must not serve wherever there is no compiler.
            "C++ options": compiler_options(),
            COMPILER: compiler_version(),
        }

    def find(self, store: ArtifactStore) -> Artifact | str:
        """The library in the store, or why it has to be built."""
        was_there = (store.root / KIND / artifact_key(KIND, self.factors)).is_dir()
        artifact = store.find(KIND, self.factors)
        if artifact is not None:
            return artifact
        by_other = store.find_alike(KIND, self.factors, ignoring=(COMPILER,))
        can_build = self.factors[COMPILER] is not None and store.is_writable and not store.is_strict
        if by_other is not None and (self.any_compiler or not can_build):
            return by_other
        if was_there:
            return "the stored one is damaged"
        if by_other is not None:
            return f"miss: {_other_compiler(by_other.manifest.factors[COMPILER], self.factors[COMPILER])}"
        # That there is no compiler is not why a stored library does not serve: any compiler's would.
        ignoring = () if self.factors[COMPILER] is not None else (COMPILER,)
        return explain_miss(store, KIND, self.factors, same=("family", "isa"), ignoring=ignoring)

    def ensure(self, store: ArtifactStore) -> Artifact:
        """The library in the store, built if need be."""
        found = self.find(store)
        return self._build(store, found) if isinstance(found, str) else found

    def load(self, store: ArtifactStore) -> tuple[Path, ctypes.CDLL]:
        """The library, loaded. One that the linker refuses (it needs another C library, say) is built again."""
        artifact = self.ensure(store)
        try:
            return _load(artifact)
        except OSError as error:
            if store.is_strict:
                raise CacheMissError(
                    f"kernel library {self.name} of the store {store.root} cannot be loaded ({error}), and "
                    "strict_compile_cache forbids building another: run graphserve warmup for a new store on a system "
                    "like this one, or start without strict_compile_cache"
                ) from error
            why = f"the stored one cannot be loaded: {error}"
        try:
            return _load(self._build(store, why, refused=artifact))
        except OSError as error:
            raise CompileError(f"kernel library {self.name} cannot be loaded: {error}") from error

    def _build(self, store: ArtifactStore, why: str, refused: Artifact | None = None) -> Artifact:
        """Build the library, unless another process does so meanwhile.

        Args:
            why: for people.
            refused: what the store has and the linker does not take.
        """
        if not store.is_strict and find_compiler() is None:
            raise CompileError(
                f"kernel library {self.name} has to be built for the store {store.root} ({why}) and no C++ compiler "
                "was found: install g++ or clang++, or point $CXX at one"
            )
        with store.lock(KIND, self.factors):
            found = self.find(store)
            if isinstance(found, Artifact) and found != refused:
                return found
            store.begin_build(f"kernel library {self.name}", why)
            self.miss = why
            return self._compile(store)

    def _compile(self, store: ArtifactStore) -> Artifact:
        begin = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="graphserve-cpp-") as folder:
                source, built = Path(folder, SOURCE_FILE), Path(folder, LIBRARY_FILE)
                source.write_text(self._source)
                # A relative name: the folder must not show in the library.
                command = compile_command(Path(source.name), Path(built.name), self._flags, self._openmp)
                result = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder)
                if result.returncode != 0:
                    raise CompileError(f"compiling {self.name} failed: {' '.join(command)}\n{result.stderr[-4000:]}")
                files = {SOURCE_FILE: self._source.encode(), LIBRARY_FILE: built.read_bytes()}
            return store.put(KIND, self.factors, files, self.name, {SECONDS: round(time.monotonic() - begin, 3)})
        except OSError as error:
            raise CompileError(f"kernel library {self.name} could not be built or stored: {error}") from error


def _load(artifact: Artifact) -> tuple[Path, ctypes.CDLL]:
    """Load a library from where it is stored, else from a copy.

    The copy helps if the store's file system is mounted noexec, or another process has just deleted the artifact.

    Raises:
        OSError: the linker takes neither; with its words on both.
    """
    path = artifact.path(LIBRARY_FILE)
    try:
        return path, ctypes.CDLL(str(path))
    except OSError as error:
        try:
            with tempfile.TemporaryDirectory(prefix="graphserve-cpp-") as folder:
                copy = Path(folder, LIBRARY_FILE)
                copy.write_bytes(artifact.read(LIBRARY_FILE))
                return path, ctypes.CDLL(str(copy))  # stays loaded when the file is gone
        except OSError as again:
            raise OSError(f"{error}; a copy of it: {again}") from again


def _other_compiler(made_by: str, at_hand: str) -> str:
    """``C++ compiler 12.2.0 → 13.1.0``; with all that they say of themselves if the numbers are the same."""
    short = [_short(version) for version in (made_by, at_hand)]
    old, new = short if short[0] != short[1] else (made_by, at_hand)
    return f"{COMPILER} {old} → {new}"


def _short(version: str) -> str:
    """``12.2.0`` of ``g++ (Debian 12.2.0-14) 12.2.0``; what a distribution adds stands in parentheses."""
    number = _VERSION.search(_PARENTHESES.sub("", version))
    return number.group() if number is not None else version
