"""Compiling generated kernels into shared libraries kept in a store, and loading them."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
Progress = Callable[[int, int, str], None]  # libraries done, libraries in all, name


class Library:
    """Loaded kernels. Invariant: every symbol asked for was built from the kernels given to :func:`build`."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._handles = [ctypes.CDLL(str(path)) for path in paths]

    def function_pointer(self, symbol: str) -> int:
        """Address of a kernel.

        Raises:
            KeyError: no library holds the symbol.
        """
        for handle in self._handles:
            function = getattr(handle, symbol, None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p).value or 0
        raise KeyError(f"kernel {symbol} is in none of the loaded libraries: {', '.join(p.name for p in self.paths)}")


def build(kernels: list[CppKernel], store_dir: Path, progress: Progress | None = None) -> Library:
    """Compile what the store lacks and load all of it.

    Kernels are grouped by ISA level and template family, one library a group, named by the hash of source and flags.
    A library in the store is used as it is unless another compiler version is at hand; it needs no compiler.

    Args:
        kernels: kernels to build; repeated keys are built once.
        store_dir: folder of the libraries, created when missing.
        progress: called after each library with (done, total, name).

    Raises:
        CompileError: a needed library is missing and there is no compiler, or the compiler failed.
    """
    store_dir.mkdir(parents=True, exist_ok=True)
    openmp = openmp_runtime()
    units: list[_StoredLibrary] = [_Unit(group, store_dir, openmp) for group in _groups(kernels)] + [
        _SequenceUnit(store_dir)
    ]
    with ThreadPoolExecutor(MAX_COMPILE_JOBS) as pool:
        for done, _ in enumerate(pool.map(lambda unit: unit.ensure(), units), start=1):
            if progress is not None:
                progress(done, len(units), units[done - 1].name)
    return Library([unit.path for unit in units])


def missing_libraries(kernels: list[CppKernel], store_dir: Path) -> list[str]:
    """Names of the libraries that :func:`build` would have to compile for ``kernels``. Compiles nothing."""
    openmp = openmp_runtime()
    units: list[_StoredLibrary] = [_Unit(group, store_dir, openmp) for group in _groups(kernels)]
    return [unit.name for unit in [*units, _SequenceUnit(store_dir)] if not unit._is_usable()]


def _groups(kernels: list[CppKernel]) -> list[list[CppKernel]]:
    groups: dict[tuple[str, tuple[str, ...]], dict[str, CppKernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.isa, kernel.families), {})[kernel.key] = kernel
    return [[group[key] for key in sorted(group)] for _, group in sorted(groups.items())]


class _StoredLibrary:
    """One shared library of the store, with its source beside it."""

    name: str
    source: str
    flags: tuple[str, ...]
    openmp: Path | None

    def __init__(self, store_dir: Path) -> None:
        runtime = self.openmp.name if self.openmp is not None else "none"
        factors = json.dumps([self.source, COMMON_FLAGS, self.flags, runtime])
        self.key = hashlib.sha256(factors.encode()).hexdigest()
        self.path = store_dir / f"{self.key}.so"
        self._record = store_dir / f"{self.key}.json"

    def ensure(self) -> None:
        """Make the library present and loadable."""
        if self._is_usable():
            return
        if compiler() is None:
            raise CompileError(
                f"kernel library {self.name} ({self.path.name}) is not in the store and no C++ compiler was found:"
                " install g++ or clang++, or point $CXX at one"
            )
        self._compile()

    def _is_usable(self) -> bool:
        if not self.path.exists():
            return False
        version = compiler_version()
        try:
            recorded = json.loads(self._record.read_text())["compiler"]
            ctypes.CDLL(str(self.path))
        except (OSError, ValueError, KeyError) as error:
            logger.warning("kernel library %s cannot be used and is built again: %s", self.path.name, error)
            return False
        # Read-only stores are taken as they are: the compiler's version decides building, not loading.
        return version in (None, recorded) or not os.access(self.path.parent, os.W_OK)

    def _compile(self) -> None:
        folder = self.path.parent
        source = folder / f"{self.key}.cpp"
        _write_atomically(source, self.source.encode())
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so.tmp", delete=False) as temporary:
            built = Path(temporary.name)
        try:
            command = compile_command(source, built, self.flags, self.openmp)
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise CompileError(f"compiling {self.name} failed: {' '.join(command)}\n{result.stderr[-4000:]}")
            built.chmod(0o755)
            record = {"name": self.name, "compiler": compiler_version(), "flags": [*COMMON_FLAGS, *self.flags]}
            _write_atomically(self._record, json.dumps(record, indent=1).encode())
            built.replace(self.path)
        finally:
            built.unlink(missing_ok=True)


class _Unit(_StoredLibrary):
    def __init__(self, kernels: list[CppKernel], store_dir: Path, openmp: Path | None) -> None:
        self.name = f"{'+'.join(kernels[0].families[1:])} ({kernels[0].isa}, {len(kernels)} kernels)"
        self.source = translation_unit(kernels)
        self.flags = ISA_LEVELS[kernels[0].isa].compiler_flags
        self.openmp = openmp
        super().__init__(store_dir)


class _SequenceUnit(_StoredLibrary):
    def __init__(self, store_dir: Path) -> None:
        self.name, self.source, self.flags, self.openmp = "sequence", template("sequence"), (), None
        super().__init__(store_dir)


def _write_atomically(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as temporary:
        temporary.write(data)
        temporary.flush()
        os.fsync(temporary.fileno())
    Path(temporary.name).replace(path)
