"""What differs between two stores, and what keeps a store's artifacts from serving this installation."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from graphserve.artifacts.difference import differing_factors
from graphserve.artifacts.manifest import SECONDS
from graphserve.artifacts.store import Artifact, ArtifactStore


def compare_stores(first: ArtifactStore, second: ArtifactStore) -> list[str]:
    """One line for each artifact that only one of the stores has, with the factors in which the nearest one differs."""
    here = {(a.manifest.kind, a.manifest.key): a for a in first.artifacts()}
    there = {(a.manifest.kind, a.manifest.key): a for a in second.artifacts()}
    lines = [*_damaged(first), *_damaged(second)]
    for names, own, other in ((("first", "second"), here, there), (("second", "first"), there, here)):
        for key in sorted(own.keys() - other.keys()):
            lines.append(_only_in(names[0], names[1], own[key], other.values()))
    for key in sorted(here.keys() & there.keys()):
        one, two = here[key].manifest, there[key].manifest
        if one.files != two.files:
            how = ", ".join(differing_factors(one.built, two.built, ignoring=(SECONDS,))) or "made by the same tools"
            lines.append(f"{one.kind} {one.label}: the same key, other contents ({how})")
    return lines


def compare_with_installation(store: ArtifactStore) -> list[str]:
    """One line for each artifact that a start on this machine would not take, with the factor that is the reason.

    Whether a GPU kernel is one that today's sources still generate only a plan tells: ``warmup --check`` looks.
    """
    from graphserve.kernels.cpu.isa import available_levels

    here = _factors_here()
    lines = _damaged(store)
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
    from graphserve.kernels.cpu.compiler import compiler_options, compiler_version, openmp_runtime
    from graphserve.kernels.cpu.isa import machine
    from graphserve.plan.store import source_hash
    from graphserve.runtime.choices import kernel_source_hash

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
        "cpp": cpp if compiler is None else {**cpp, "C++ compiler": compiler},
    }


def _damaged(store: ArtifactStore) -> list[str]:
    return [f"{folder.parent.name} {folder.name}: damaged ({why})" for folder, why in store.verify() if why is not None]


def _only_in(name: str, other_name: str, artifact: Artifact, others: Iterable[Artifact]) -> str:
    manifest = artifact.manifest
    candidates = [
        differing_factors(other.manifest.factors, manifest.factors)
        for other in others
        if other.manifest.kind == manifest.kind and other.manifest.label == manifest.label
    ]
    nearest = min(candidates, key=len, default=None)
    why = f"{other_name} has nothing of that name" if nearest is None else ", ".join(nearest)
    return f"{manifest.kind} {manifest.label}: only in the {name} ({why})"
