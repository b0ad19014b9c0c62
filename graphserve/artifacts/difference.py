"""Why something is not in a store: the factors in which the nearest stored artifact differs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from graphserve.artifacts.store import ArtifactStore

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
    candidates = (
        differing_factors(artifact.manifest.factors, factors, ignoring)
        for artifact in store.artifacts(kind)
        if all(artifact.manifest.factors.get(name) == factors.get(name) for name in same)
    )
    phrases = min(candidates, key=len, default=[])  # of the artifact that differs least
    if not phrases:
        return "nothing stored for it"
    more = f" and {len(phrases) - _SHOWN} more" if len(phrases) > _SHOWN else ""
    return f"miss: {', '.join(phrases[:_SHOWN])}{more}"


def _text(value: Any) -> str:
    return "none" if value in (None, [], {}) else str(value)
