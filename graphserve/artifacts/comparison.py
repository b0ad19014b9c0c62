"""What differs between two stores, and what keeps a store's artifacts from serving this installation."""

from __future__ import annotations

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
    lines: list[str] = []
    for names, own, other in ((("first", "second"), here, there), (("second", "first"), there, here)):
        for key in sorted(own.keys() - other.keys()):
            lines.append(_only_in(names[0], names[1], own[key], other.values()))
    for key in sorted(here.keys() & there.keys()):
        one, two = here[key].manifest, there[key].manifest
        facts = [{n: v for n, v in m.built.items() if n != SECONDS} for m in (one, two)]
        if one.files != two.files:
            how = ", ".join(differing_factors(*facts)) or "made by the same tools"
            lines.append(f"{one.kind} {one.label}: the same key, other contents ({how})")
    return lines


def compare_with_installation(store: ArtifactStore) -> list[str]:
    """One line for each artifact that a start on this machine would not take, with the factor that is the reason."""
    from graphserve.kernels.cpu.compiler import openmp_runtime
    from graphserve.kernels.cpu.isa import available_levels
    from graphserve.plan.store import source_hash

    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    sources = {"torch": versions["torch"].split("+")[0], "transformers": versions["transformers"]}
    openmp = openmp_runtime()
    lines: list[str] = []
    for artifact in store.artifacts():
        manifest = artifact.manifest
        wanted: dict[str, Any] = dict(manifest.factors)
        if manifest.kind in ("plan", "weights"):
            wanted |= {**sources, "graphserve sources": source_hash()}
        elif manifest.kind == "cpp" and manifest.factors["OpenMP runtime"] is not None:
            wanted["OpenMP runtime"] = openmp.name if openmp is not None else None
        reasons = differing_factors(manifest.factors, wanted)
        if manifest.kind == "cpp" and manifest.factors["isa"] not in available_levels():
            reasons.append(f"this processor lacks {manifest.factors['isa']}")
        if reasons:
            lines.append(f"{manifest.kind} {manifest.label}: {', '.join(reasons)}")
    return lines


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
