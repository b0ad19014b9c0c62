"""Keeping a store below a size: the artifacts that were not used for longest go first."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from graphserve.artifacts.cache_dir import cache_dir
from graphserve.artifacts.manifest import MANIFEST_NAME
from graphserve.artifacts.store import QUARANTINE, ArtifactStore, children, remove_stale_temporaries, why_damaged
from graphserve.errors import ConfigError
from graphserve.progress import format_bytes

logger = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 8 << 30
LIMIT_VARIABLE = "GRAPHSERVE_CACHE_LIMIT"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Entry:
    """A folder that takes room in a store: an artifact, readable or not, or one in quarantine."""

    folder: Path
    num_bytes: int
    used_at: float  # seconds since the epoch


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
    if not named:
        return DEFAULT_LIMIT_BYTES
    try:
        return parse_size(named)
    except ConfigError as error:
        raise ConfigError(f"{LIMIT_VARIABLE}: {error}") from None


def keep_below_limit(store: ArtifactStore, used: Collection[Path] = ()) -> None:
    """Prune the user's own cache to ``GRAPHSERVE_CACHE_LIMIT``; a store that a user named is the user's to prune.

    Args:
        used: folders of artifacts that stay, even if they alone are larger.
    """
    if store.root != cache_dir():
        return
    limit = limit_bytes()
    removed = prune(store, limit, used)
    if removed:
        logger.info("deleted %d entries of %s that were not used for longest", len(removed), store.root)
    rest = sum(entry.num_bytes for entry in _entries(store))
    if rest > limit:
        logger.warning(
            "%s has %s, more than its limit of %s: what is needed now was kept. Set %s higher",
            store.root,
            format_bytes(rest),
            format_bytes(limit),
            LIMIT_VARIABLE,
        )


def prune(
    store: ArtifactStore, max_bytes: int, used: Collection[Path] = (), removes_damaged: bool = False
) -> list[Entry]:
    """Delete what was not used for longest, until the rest fits; returns what was deleted.

    What was found damaged, or cannot be read, counts as well, and with ``removes_damaged`` it goes in any case, as does
    what killed processes left half written. A process that has loaded a deleted library keeps it.

    Args:
        used: folders of artifacts that stay.
    """
    remove_stale_temporaries(store.root)
    entries = _entries(store)
    total = sum(entry.num_bytes for entry in entries)
    removed: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.used_at):
        goes_anyway = removes_damaged and _is_damaged(store, entry)
        if not goes_anyway and (total <= max_bytes or entry.folder in used):
            continue
        if _remove(store.root, entry.folder):
            total -= entry.num_bytes
            removed.append(entry)
    return removed


def _entries(store: ArtifactStore) -> list[Entry]:
    folders = [*store.folders(), *children(store.root / QUARANTINE)]
    return [Entry(folder, _size(folder), _last_use(folder)) for folder in folders]


def _is_damaged(store: ArtifactStore, entry: Entry) -> bool:
    return entry.folder.parent == store.root / QUARANTINE or why_damaged(entry.folder) is not None


def _size(folder: Path) -> int:
    total = 0
    for path in children(folder):
        with contextlib.suppress(OSError):  # deleted meanwhile
            total += path.stat().st_size
    return total


def _last_use(folder: Path) -> float:
    for path in (folder / MANIFEST_NAME, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
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
