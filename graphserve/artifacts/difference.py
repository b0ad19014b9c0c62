"""Why something is not in a store: the factors in which the nearest stored artifact differs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graphserve.artifacts.store import Artifact, ArtifactStore

_HASH = re.compile(r"[0-9a-f]{32,64}")
_SHOWN = 3


def differing_factors(stored: Mapping[str, Any], wanted: Mapping[str, Any], ignoring: Sequence[str] = ()) -> list[str]:
    """One phrase a differing factor: ``torch 2.12.0 → 2.13.0``; hashes are only said to differ."""
    phrases = []
    for name in [n for n in {**wanted, **stored} if n not in ignoring]:
        old, new = stored.get(name), wanted.get(name)
        if old != new:
            is_opaque = any(_HASH.fullmatch(str(value)) for value in (old, new))
            phrases.append(f"other {name}" if is_opaque else f"{name} {_text(old)} → {_text(new)}")
    return phrases


def nearest(
    store: ArtifactStore,
    kind: str,
    factors: Mapping[str, Any],
    same: Sequence[str] = (),
    ignoring: Sequence[str] = (),
) -> tuple[Artifact, list[str]] | None:
    """The stored artifact that differs least, and how; None if none has equal values of the factors in ``same``."""
    candidates = [
        (artifact, differing_factors(artifact.manifest.factors, factors, ignoring))
        for artifact in store.artifacts(kind)
        if all(artifact.manifest.factors.get(name) == factors.get(name) for name in same)
    ]
    return min(candidates, key=lambda item: len(item[1]), default=None)


def explain_miss(
    store: ArtifactStore,
    kind: str,
    factors: Mapping[str, Any],
    same: Sequence[str] = (),
    ignoring: Sequence[str] = (),
) -> str:
    """Half a sentence that tells a user why a stored artifact does not serve: ``miss: torch 2.12.0 → 2.13.0``.

    Args:
        same: factors without which an artifact has nothing to do with the one that is missed.
        ignoring: factors that are not the reason.
    """
    found = nearest(store, kind, factors, same, ignoring)
    if found is None or not found[1]:
        return "nothing stored for it"
    phrases = found[1]
    more = f" and {len(phrases) - _SHOWN} more" if len(phrases) > _SHOWN else ""
    return f"miss: {', '.join(phrases[:_SHOWN])}{more}"


def _text(value: Any) -> str:
    return "none" if value in (None, [], {}) else str(value)
