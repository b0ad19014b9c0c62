"""Which store a run uses: the user's cache, a named folder, or a bundle."""

from __future__ import annotations

from pathlib import Path

from graphserve.artifacts.cache_dir import cache_dir
from graphserve.artifacts.store import ArtifactStore
from graphserve.errors import ConfigError


def open_store(named: str | Path | None = None, is_strict: bool = False) -> ArtifactStore:
    """The store that ``--compile-cache`` names.

    Args:
        named: a folder made by ``graphserve warmup --output``, a bundle (``.tar.zst``; it is unpacked into the user's
            cache: what that lacks or has damaged), or None for the user's cache.
        is_strict: nothing may be built.

    Raises:
        ConfigError: there is no such folder or file, or the bundle is damaged.
    """
    if named is None:
        return ArtifactStore(cache_dir(), is_strict)
    path = Path(named).expanduser()
    if path.is_dir():
        return ArtifactStore(path, is_strict)
    if path.is_file():
        from graphserve.artifacts.bundle import import_bundle

        store = ArtifactStore(cache_dir(), is_strict)
        import_bundle(path, store)
        return store
    raise ConfigError(
        f"compile_cache={str(named)!r} does not exist: give a folder, or a .tar.zst file, made by graphserve "
        "warmup --output"
    )
