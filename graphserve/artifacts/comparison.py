"""What differs between two stores."""

from __future__ import annotations

from collections.abc import Iterable

from graphserve.artifacts.difference import differing_factors
from graphserve.artifacts.manifest import SECONDS
from graphserve.artifacts.store import Artifact, ArtifactStore


def compare_stores(first: ArtifactStore, second: ArtifactStore) -> list[str]:
    """One line for each artifact that only one of the stores has, with the factors in which the nearest one differs."""
    here = {(a.manifest.kind, a.manifest.key): a for a in first.artifacts()}
    there = {(a.manifest.kind, a.manifest.key): a for a in second.artifacts()}
    lines = [*damaged_artifacts(first), *damaged_artifacts(second)]
    for names, own, other in ((("first", "second"), here, there), (("second", "first"), there, here)):
        for key in sorted(own.keys() - other.keys()):
            lines.append(_only_in(names[0], names[1], own[key], other.values()))
    for key in sorted(here.keys() & there.keys()):
        one, two = here[key].manifest, there[key].manifest
        if one.files != two.files:
            how = ", ".join(differing_factors(one.built, two.built, ignoring=(SECONDS,))) or "made by the same tools"
            lines.append(f"{one.kind} {one.label}: the same key, other contents ({how})")
    return lines


def damaged_artifacts(store: ArtifactStore) -> list[str]:
    """One line for each artifact that cannot be used."""
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
