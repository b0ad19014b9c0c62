"""Artifacts under one root folder: found by their factors, checked before use, written whole or not at all.

    <root>/<kind>/<key>/manifest.json   and the files that it names
    <root>/quarantine/                  artifacts that failed a check
    <root>/locks/                       one file an artifact that is or was being made
    <root>/tmp/                         artifacts being written

Several processes may use a root at a time, and a root may be read-only or copied to another machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphserve.artifacts.cache_dir import own_folder
from graphserve.artifacts.locks import process_lock
from graphserve.artifacts.manifest import MANIFEST_NAME, FileRecord, Manifest, artifact_key, is_key
from graphserve.errors import CacheMissError, ConfigError

logger = logging.getLogger(__name__)

KINDS = ("plan", "weights", "cpp", "triton", "tokenizer", "choices")
QUARANTINE = "quarantine"
LOCK_TIMEOUT_S = 600.0  # a builder that takes longer than this is taken for stuck

_TOUCH_INTERVAL_S = 60.0  # the time of last use need not be more exact
_STALE_TEMPORARY_S = 3600.0  # what a killed process left behind in tmp/


@dataclass(frozen=True)
class Artifact:
    """An artifact of a store.

    Attributes:
        contents: its files as they were checked, by name; empty if nothing was read but the manifest.
    """

    folder: Path
    manifest: Manifest
    contents: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def path(self, name: str) -> Path:
        """Where a file is, unless another process has deleted the artifact."""
        assert name in self.manifest.files
        return self.folder / name

    def read(self, name: str) -> bytes:
        """A file's contents: as they were checked, else what the file holds now."""
        return self.contents[name] if name in self.contents else self.path(name).read_bytes()


class ArtifactStore:
    """The artifacts of one root.

    Args:
        root: the folder; made when something is stored.
        is_strict: nothing may be built (see :meth:`begin_build`).
        must_keep: what the root does not take is an error; by default it is kept for this run only.

    Attributes:
        built: names of what this process built, in order.
    """

    def __init__(self, root: Path, is_strict: bool = False, must_keep: bool = False) -> None:
        self.root = root
        self.is_strict = is_strict
        self.must_keep = must_keep
        self.built: list[str] = []
        self._has_own_root = False  # something could not be kept in the root

    @property
    def is_writable(self) -> bool:
        """Whether new artifacts can be kept in the root."""
        folder = self.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK)

    def require_writable(self) -> None:
        """Refuse a root that keeps nothing.

        Raises:
            ConfigError: it is a file, or may not be written.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"{self.root} is a file, not the folder of a store: name a folder")
        if not self.is_writable:
            raise ConfigError(f"{self.root} cannot be written: name another folder, or change its permissions")

    def begin_build(self, name: str, why: str = "") -> None:
        """Called before anything is compiled.

        Args:
            why: it is not taken from the store, such as ``miss: torch 2.12.0 → 2.13.0``.

        Raises:
            CacheMissError: the store is strict.
        """
        reason = f" ({why})" if why else ""
        if self.is_strict:
            raise CacheMissError(
                f"{name} is not in the store {self.root}{reason}, and strict_compile_cache forbids building it: run "
                "graphserve warmup with the same model and options first"
            )
        logger.info("building %s, which is not in the store%s", name, reason)
        self.built.append(name)

    def find(self, kind: str, factors: Mapping[str, Any]) -> Artifact | None:
        """The artifact for ``factors``, or None if there is none or it is damaged (it is then put into quarantine)."""
        key = artifact_key(kind, dict(factors))
        for root in self._roots():
            artifact = self._checked(root / kind / key)
            if artifact is not None:
                return artifact
        return None

    def find_alike(self, kind: str, factors: Mapping[str, Any], ignoring: Collection[str]) -> Artifact | None:
        """An artifact that equals ``factors`` in all but those whose names are in ``ignoring``, or None."""

        def rest(of: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in of.items() if name not in ignoring}

        wanted = rest(factors)
        for candidate in self.artifacts(kind):
            if rest(candidate.manifest.factors) == wanted and (artifact := self._checked(candidate.folder)) is not None:
                return artifact
        return None

    def put(
        self,
        kind: str,
        factors: Mapping[str, Any],
        files: Mapping[str, bytes],
        label: str,
        built: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Store an artifact, in place of the one that may be there.

        Unless the store ``must_keep``, a root that cannot be written (read-only, full) is replaced by a folder of this
        process's own, said once in the log.

        Args:
            files: contents by name.
            label: for people: what it is.
            built: facts about the making that are no factor.

        Raises:
            ConfigError: the root cannot be written, and the store must keep it.
            OSError: not even the folder of this process can be written.
        """
        records = {name: FileRecord(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
        manifest = Manifest(kind=kind, label=label, factors=dict(factors), files=records, built=dict(built or {}))
        contents = {**files, MANIFEST_NAME: manifest.encode()}
        if not self._has_own_root:
            try:
                return Artifact(_write(self.root, manifest, contents), manifest, files)
            except OSError as error:
                if self.must_keep:
                    raise ConfigError(f"{label} cannot be stored in {self.root}: {error}") from error
                logger.warning("%s cannot be stored in %s, it is kept for this run only: %s", label, self.root, error)
                self._has_own_root = True
        return Artifact(_write(_own_root(), manifest, contents), manifest, files)

    def lock(self, kind: str, factors: Mapping[str, Any], timeout_s: float = LOCK_TIMEOUT_S) -> AbstractContextManager:
        """Hold while an artifact is looked for again and made, so that other processes wait for it.

        A strict store makes nothing, so there is nothing to wait for.
        """
        if self.is_strict:
            return contextlib.nullcontext()
        key = artifact_key(kind, dict(factors))
        with contextlib.suppress(OSError):
            _make_root(self.root)
        return process_lock(self.root / "locks" / f"{kind}-{key}", timeout_s, f"{kind} {key[:12]}")

    def artifacts(self, kind: str | None = None) -> Iterator[Artifact]:
        """Every artifact of the root whose manifest can be read; the files themselves are not checked."""
        for folder in self.folders(kind):
            with contextlib.suppress(OSError, ValueError):
                yield Artifact(folder, _manifest(folder))

    def verify(self) -> Iterator[tuple[Path, str | None]]:
        """Check every artifact of the root: its folder and what is wrong with it. Changes nothing."""
        for folder in self.folders():
            yield folder, why_damaged(folder)

    def folders(self, kind: str | None = None) -> Iterator[Path]:
        """The folder of every artifact of the root, whatever is in it."""
        for name in KINDS if kind is None else (kind,):
            yield from (folder for folder in children(self.root / name) if is_key(folder.name) and folder.is_dir())

    def quarantine(self, folder: Path, reason: str) -> None:
        """Take an artifact out of use; one that cannot be moved stays and is passed over at each start."""
        target = self.root / QUARANTINE / f"{folder.parent.name}-{folder.name}-{time.time_ns():x}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
            logger.warning("stored %s %s is damaged (%s): moved to quarantine", folder.parent.name, folder.name, reason)
        except OSError:
            logger.warning("stored %s %s is damaged (%s): passed over", folder.parent.name, folder.name, reason)

    def _roots(self) -> list[Path]:
        # What this process had to make for itself comes first: it may replace something unusable in the root.
        return [_own_root(), self.root] if self._has_own_root else [self.root]

    def _checked(self, folder: Path) -> Artifact | None:
        if not folder.is_dir():
            return None
        loaded = load_artifact(folder)
        if isinstance(loaded, str):
            # Another process may have replaced it in the meantime: what is there now decides.
            with process_lock(self.root / "locks" / "quarantine", 10.0, "quarantine"):
                loaded = load_artifact(folder)
                if isinstance(loaded, str) and folder.is_dir():
                    self.quarantine(folder, loaded)
        if isinstance(loaded, str):
            return None
        with contextlib.suppress(OSError):
            if time.time() - (folder / MANIFEST_NAME).stat().st_mtime > _TOUCH_INTERVAL_S:
                os.utime(folder / MANIFEST_NAME)
        return loaded


def _own_root() -> Path:
    """Where this process's stores put what their roots do not take."""
    return own_folder() / "store"


def load_artifact(folder: Path) -> Artifact | str:
    """An artifact with its checked contents; or what is wrong with it: the file and the reason."""
    try:
        manifest = _manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST_NAME}: {error}"
    if (manifest.kind, manifest.key) != (folder.parent.name, folder.name):
        return f"{MANIFEST_NAME} belongs to {manifest.kind} {manifest.key}"
    contents: dict[str, bytes] = {}
    for name, record in manifest.files.items():
        try:
            # The size first: what took the file's place may be larger than the memory.
            size = (folder / name).stat().st_size
            data = (folder / name).read_bytes() if size == record.num_bytes else b""
        except OSError as error:
            return f"{name}: {error.strerror}"
        if size != record.num_bytes or hashlib.sha256(data).hexdigest() != record.sha256:
            return f"{name} fails its checksum"
        contents[name] = data
    return Artifact(folder, manifest, contents)


def why_damaged(folder: Path) -> str | None:
    """What is wrong with an artifact: the file and the reason, or None."""
    loaded = load_artifact(folder)
    return loaded if isinstance(loaded, str) else None


def remove_stale_temporaries(root: Path) -> None:
    """Delete what killed processes left half written."""
    for folder in children(root / "tmp"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_TEMPORARY_S:
                shutil.rmtree(folder, ignore_errors=True)


def _manifest(folder: Path) -> Manifest:
    return Manifest.decode((folder / MANIFEST_NAME).read_bytes())


def children(parent: Path) -> list[Path]:
    """What a folder holds, in order; nothing if it cannot be read."""
    try:
        return sorted(parent.iterdir())
    except OSError:
        return []


def _write(root: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Path:
    """Write a folder beside its place and rename it there; the folder that holds the artifact now."""
    folder = root / manifest.kind / manifest.key
    _make_root(root)
    folder.parent.mkdir(exist_ok=True)
    (root / "tmp").mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root / "tmp"))
    try:
        for name, data in contents.items():
            _write_file(temporary / name, data)
        _sync(temporary)
        temporary.chmod(0o755)
        _move_into_place(temporary, folder, manifest)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _make_root(root: Path) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)


def _move_into_place(temporary: Path, folder: Path, manifest: Manifest) -> None:
    """Rename; what is in the way is kept if it is as good, and replaced if it is damaged or was made otherwise."""
    for _ in range(3):
        try:
            temporary.rename(folder)
            return
        except OSError:
            if not folder.is_dir():
                raise
        if why_damaged(folder) is None and _manifest(folder).equals(manifest):
            return  # another process was quicker
        old = Path(tempfile.mkdtemp(dir=temporary.parent))
        with contextlib.suppress(OSError):
            folder.rename(old / "replaced")
        shutil.rmtree(old, ignore_errors=True)
    raise OSError(f"{folder} cannot be replaced")


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
