"""Keeping a store below a size: the artifacts that were not used for longest go first."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from graphserve.artifacts.manifest import MANIFEST_NAME
from graphserve.artifacts.store import Artifact, ArtifactStore, remove_stale_temporaries
from graphserve.errors import ConfigError

DEFAULT_LIMIT_BYTES = 8 << 30
LIMIT_VARIABLE = "GRAPHSERVE_CACHE_LIMIT"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """``500M`` or ``8G`` or a number of bytes.

    Raises:
        ConfigError: it is neither.
    """
    number, unit = (text[:-1], text[-1].upper()) if text and text[-1].upper() in "KMGT" else (text, "")
    if not number.isdecimal():
        raise ConfigError(f"{text!r} is not a size: give bytes, or a whole number with K, M, G or T, such as 8G")
    return int(number) * _UNITS[unit]


def limit_bytes() -> int:
    """The size that stores are kept below: ``GRAPHSERVE_CACHE_LIMIT``, else 8 GiB."""
    named = os.environ.get(LIMIT_VARIABLE)
    return DEFAULT_LIMIT_BYTES if not named else parse_size(named)


def prune(store: ArtifactStore, max_bytes: int, removes_quarantine: bool = False) -> list[Artifact]:
    """Delete artifacts, least recently used first, until the rest fits; returns those deleted.

    What killed processes left half written goes as well, and with ``removes_quarantine`` what was found damaged.
    A process that has loaded a deleted library keeps it.
    """
    remove_stale_temporaries(store.root)
    if removes_quarantine:
        shutil.rmtree(store.root / "quarantine", ignore_errors=True)
    by_age = sorted(store.artifacts(), key=_last_use)
    total = sum(artifact.manifest.num_bytes for artifact in by_age)
    removed: list[Artifact] = []
    for artifact in by_age:
        if total <= max_bytes:
            break
        if _remove(store.root, artifact.folder):
            total -= artifact.manifest.num_bytes
            removed.append(artifact)
    return removed


def _last_use(artifact: Artifact) -> float:
    try:
        return (artifact.folder / MANIFEST_NAME).stat().st_mtime
    except OSError:
        return 0.0


def _remove(root: Path, folder: Path) -> bool:
    """Take the folder away in one step, so that no reader sees half of it."""
    with contextlib.suppress(OSError):
        (root / "tmp").mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=root / "tmp"))
        folder.rename(aside / "removed")
        shutil.rmtree(aside, ignore_errors=True)
        return True
    return False
