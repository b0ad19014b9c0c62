"""Compiled Triton kernels as artifacts: found and loaded without Triton, compiled only when they are missing.

    triton  source.py      the kernel's module
            binary         cubin or hsaco
            assembly.txt   PTX or AMDGCN
            machine.txt    SASS (cuda)
            facts.json     what a launch needs to know, and counts from the machine code

The key is the kernel's own and the target. Triton's version is no factor: a binary needs no Triton.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from graphserve.artifacts.store import Artifact, ArtifactStore
from graphserve.kernels.triton.kernel import TritonKernel

logger = logging.getLogger(__name__)

_FORMAT = 2  # raised whenever CompiledKernel or the way of compiling changes
TRITON_VERSION = "triton"  # in an artifact's facts on its making

_SOURCE, _BINARY, _ASSEMBLY, _MACHINE, _FACTS = "source.py", "binary", "assembly.txt", "machine.txt", "facts.json"
_CONTENTS = ("binary", "asm", "sass")  # fields that are files of their own

_VERSION = re.compile(r"^__version__ = ['\"]([^'\"]+)", re.MULTILINE)

Progress = Callable[[int, int], None]  # kernels done, kernels in all


class CompiledKernel(msgspec.Struct, frozen=True):
    """One kernel for one target.

    Attributes:
        name: the entry's name in the binary.
        target: ``cuda:90``.
        binary: cubin or hsaco.
        asm: PTX (cuda) or AMDGCN (hip), as the compiler wrote it.
        sass: the machine code in words (cuda), empty for hip.
        num_warps: of one program; one with 64 lanes for hip, 32 for cuda.
        shared_bytes: dynamic shared memory of a launch.
        scratch_bytes: global scratch that the compiler itself asks for; our launcher passes none.
        num_registers: vector registers a thread.
        num_spills: local-memory loads and stores (cuda), spilled vector registers (hip).
        num_vector_loads_128: 128-bit loads from global memory, asynchronous copies to shared memory among them.
        num_vector_stores_128: 128-bit stores to global memory.
        num_mma: matrix instructions in the code (not executed ones).
    """

    name: str
    target: str
    binary: bytes
    asm: str
    sass: str
    num_warps: int
    shared_bytes: int
    scratch_bytes: int
    num_registers: int
    num_spills: int
    num_vector_loads_128: int
    num_vector_stores_128: int
    num_mma: int


def installed_version() -> str | None:
    """``triton.__version__`` without the time that importing Triton takes; None where there is none.

    Not the version of a distribution: those with this package have several names.
    """
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    found = _VERSION.search(Path(spec.origin).read_text())
    return found[1] if found is not None else None


def find_compiled(store: ArtifactStore, kernel: TritonKernel, target: str) -> Artifact | None:
    """The stored binary of a kernel."""
    return store.find("triton", _factors(kernel, target))


def decode_compiled(artifact: Artifact) -> CompiledKernel:
    """The contents of a stored binary."""
    facts: dict[str, Any] = msgspec.json.decode(artifact.read(_FACTS))
    texts = {"asm": artifact.read(_ASSEMBLY).decode(), "sass": artifact.read(_MACHINE).decode()}
    return msgspec.convert({**facts, **texts, "binary": artifact.read(_BINARY)}, CompiledKernel)


def compile_into(
    store: ArtifactStore, kernel: TritonKernel, target: str, compile_now: Callable[[], CompiledKernel], version: str
) -> CompiledKernel:
    """Take a kernel that this version of Triton compiled from the store, or compile and store it.

    Args:
        compile_now: makes it; called by one process at a time.
        version: of Triton and of our use of it; a stored binary of another version is made again.

    Raises:
        CacheMissError: it is not stored and the store is strict.
    """
    factors = _factors(kernel, target)

    def found() -> CompiledKernel | None:
        artifact = store.find("triton", factors)
        is_current = artifact is not None and artifact.manifest.built.get(TRITON_VERSION) == version
        return decode_compiled(artifact) if artifact is not None and is_current else None

    stored = found()
    if stored is not None:
        return stored
    with store.lock("triton", factors):
        stored = found()
        if stored is not None:
            return stored
        store.begin_build(f"kernel {kernel.symbol} for {target}")
        begin = time.monotonic()
        compiled = compile_now()
        facts = {TRITON_VERSION: version, "seconds": round(time.monotonic() - begin, 3)}
        _save(store, kernel, factors, compiled, facts)
        return compiled


def find_or_compile_kernels(
    kernels: Mapping[str, TritonKernel], target: str, store: ArtifactStore, progress: Progress | None = None
) -> dict[str, CompiledKernel]:
    """The binary of each kernel. Triton is imported only if one is missing; any version's binary is taken.

    Several missing ones are compiled side by side, one a processor.

    Args:
        kernels: by key.
        progress: called after each kernel with (done, total), from any thread.

    Raises:
        CacheMissError: one is not stored and the store is strict.
        CompileError: Triton refuses one (a bug of ours).
    """
    done = itertools.count(1)

    def advance() -> None:
        if progress is not None:
            progress(next(done), len(kernels))

    compiled: dict[str, CompiledKernel] = {}
    missing: dict[str, TritonKernel] = {}
    for key, kernel in kernels.items():
        artifact = find_compiled(store, kernel, target)
        if artifact is None:
            missing[key] = kernel
        else:
            compiled[key] = decode_compiled(artifact)
            advance()
    if store.is_strict and missing:
        store.begin_build(f"kernel {next(iter(missing.values())).symbol} for {target}")
    is_parallel = len(missing) > 1 and store.is_writable
    if is_parallel:
        from graphserve.kernels.triton.compile_jobs import compile_in_processes, default_jobs

        compile_in_processes(list(missing.values()), target, store, default_jobs(), advance)
    for key, kernel in missing.items():
        artifact = find_compiled(store, kernel, target) if is_parallel else None
        if artifact is not None:
            compiled[key] = decode_compiled(artifact)
            continue
        from graphserve.kernels.triton.compile import compile_for

        compiled[key] = compile_for(kernel, target, store)
        if not is_parallel:
            advance()
    return compiled


def _factors(kernel: TritonKernel, target: str) -> dict[str, Any]:
    return {"kernel": kernel.key, "target": target, "format": _FORMAT}


def _save(
    store: ArtifactStore,
    kernel: TritonKernel,
    factors: Mapping[str, Any],
    compiled: CompiledKernel,
    built: Mapping[str, Any],
) -> None:
    facts = {k: v for k, v in msgspec.structs.asdict(compiled).items() if k not in _CONTENTS}
    files = {
        _SOURCE: kernel.source.encode(),
        _BINARY: compiled.binary,
        _ASSEMBLY: compiled.asm.encode(),
        _MACHINE: compiled.sass.encode(),
        _FACTS: msgspec.json.format(msgspec.json.encode(facts), indent=1),
    }
    try:
        store.put("triton", factors, files, f"{kernel.symbol} for {compiled.target}", built)
    except OSError as error:
        logger.warning("kernel %s could not be stored: %s", kernel.symbol, error)
