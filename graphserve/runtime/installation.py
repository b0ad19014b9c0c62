"""What keeps the artifacts of a store from serving this installation."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from graphserve.artifacts import ArtifactStore
from graphserve.artifacts.comparison import damaged_artifacts
from graphserve.artifacts.difference import differing_factors
from graphserve.kernels.cpu.build import COMPILER
from graphserve.kernels.cpu.compiler import compiler_options, compiler_version, openmp_runtime
from graphserve.kernels.cpu.isa import available_levels, machine
from graphserve.plan.store import source_hash
from graphserve.runtime.choices import kernel_source_hash


def compare_with_installation(store: ArtifactStore) -> list[str]:
    """One line for each artifact that a start on this machine would not take, with the factor that is the reason.

    Whether a GPU kernel is one that today's sources still generate only a plan tells: ``warmup --check`` looks.
    """
    here = _factors_here()
    lines = damaged_artifacts(store)
    for artifact in store.artifacts():
        manifest = artifact.manifest
        # What is None was of no importance: a library without threads needs no OpenMP runtime.
        factors = {name for name, value in manifest.factors.items() if value is not None}
        names = factors & here.get(manifest.kind, {}).keys()
        wanted = {**manifest.factors, **{name: here[manifest.kind][name] for name in names}}
        reasons = differing_factors(manifest.factors, wanted)
        isa = manifest.factors.get("isa")
        if manifest.kind == "cpp" and isa not in available_levels():
            reasons.append(f"this processor lacks {isa}")
        if reasons:
            lines.append(f"{manifest.kind} {manifest.label}: {', '.join(reasons)}")
    return lines


def _factors_here() -> dict[str, dict[str, Any]]:
    """By kind, the factors that follow from this installation and this machine alone."""
    sources = {
        "torch": metadata.version("torch").split("+")[0],
        "transformers": metadata.version("transformers"),
        "graphserve sources": source_hash(),
    }
    openmp, compiler = openmp_runtime(), compiler_version()
    cpp = {
        "OpenMP runtime": openmp.name if openmp is not None else None,
        "machine": machine(),
        "system": platform.system(),
        "C++ options": compiler_options(),
    }
    return {
        "plan": sources,
        "weights": sources,
        "choices": {**sources, "kernel sources": kernel_source_hash()},
        # Where there is no compiler, a start takes what any of them made.
        "cpp": cpp if compiler is None else {**cpp, COMPILER: compiler},
    }
