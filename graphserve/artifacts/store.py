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
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphserve.artifacts.locks import process_lock
from graphserve.artifacts.manifest import MANIFEST_NAME, FileRecord, Manifest, artifact_key, is_key
from graphserve.errors import CacheMissError

logger = logging.getLogger(__name__)

KINDS = ("plan", "weights", "cpp", "triton", "tokenizer", "choices")
LOCK_TIMEOUT_S = 600.0  # a builder that takes longer than this is taken for stuck

_TOUCH_INTERVAL_S = 60.0  # the time of last use need not be more exact
_STALE_TEMPORARY_S = 3600.0  # what a killed process left behind in tmp/


@dataclass(frozen=True)
class Artifact:
    """A checked artifact: at the time it was found, its files were those that its manifest names."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where a file is."""
        assert name in self.manifest.files
        return self.folder / name

    def read(self, name: str) -> bytes:
        """A file's contents."""
        return self.path(name).read_bytes()


class ArtifactStore:
    """The artifacts of one root.

    Args:
        root: the folder; made when something is stored.
        is_strict: nothing may be built (see :meth:`begin_build`).

    Attributes:
        built: names of what this process built, in order.
    """

    def __init__(self, root: Path, is_strict: bool = False) -> None:
        self.root = root
        self.is_strict = is_strict
        self.built: list[str] = []
        self._private: Path | None = None

    @property
    def is_writable(self) -> bool:
        """Whether new artifacts can be kept in the root."""
        folder = self.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK)

    def begin_build(self, name: str) -> None:
        """Called before anything is compiled.

        Raises:
            CacheMissError: the store is strict.
        """
        if self.is_strict:
            raise CacheMissError(
                f"{name} is not in the store {self.root}, and strict_compile_cache forbids building it: run graphserve "
                "warmup with the same model and options first"
            )
        self.built.append(name)

    def find(self, kind: str, factors: Mapping[str, Any]) -> Artifact | None:
        """The artifact for ``factors``, or None if there is none or it is damaged (it is then put into quarantine)."""
        key = artifact_key(kind, dict(factors))
        for root in self._roots():
            artifact = self._checked(root / kind / key)
            if artifact is not None:
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

        A root that cannot be written (read-only, full) is replaced by a folder of this process's own, said once in the
        log.

        Args:
            files: contents by name.
            label: for people: what it is.
            built: facts about the making that are no factor.

        Raises:
            OSError: not even that folder can be written.
        """
        records = {name: FileRecord(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
        manifest = Manifest(kind=kind, label=label, factors=dict(factors), files=records, built=dict(built or {}))
        contents = {**files, MANIFEST_NAME: manifest.encode()}
        if self._private is None:
            try:
                return Artifact(_write(self.root, manifest, contents), manifest)
            except OSError as error:
                logger.warning("%s cannot be stored in %s, it is kept for this run only: %s", label, self.root, error)
                self._private = Path(tempfile.mkdtemp(prefix="graphserve-"))
                self._remove_private = weakref.finalize(self, shutil.rmtree, self._private, ignore_errors=True)
        return Artifact(_write(self._private, manifest, contents), manifest)

    def close(self) -> None:
        """Delete what could be kept for this run only; libraries that are loaded stay usable."""
        if self._private is not None:
            self._remove_private()
            self._private = None

    def lock(self, kind: str, factors: Mapping[str, Any], timeout_s: float = LOCK_TIMEOUT_S) -> AbstractContextManager:
        """Hold while an artifact is looked for again and made, so that other processes wait for it."""
        key = artifact_key(kind, dict(factors))
        return process_lock(self.root / "locks" / f"{kind}-{key}", timeout_s, f"{kind} {key}")

    def artifacts(self, kind: str | None = None) -> Iterator[Artifact]:
        """Every artifact of the root whose manifest can be read; the files themselves are not checked."""
        for name in KINDS if kind is None else (kind,):
            for folder in _folders(self.root / name):
                with contextlib.suppress(OSError, ValueError):
                    yield Artifact(folder, _manifest(folder))

    def verify(self) -> Iterator[tuple[Path, str | None]]:
        """Check every artifact of the root: its folder and what is wrong with it. Changes nothing."""
        for name in KINDS:
            for folder in _folders(self.root / name):
                yield folder, why_damaged(folder)

    def quarantine(self, folder: Path, reason: str) -> None:
        """Take an artifact out of use; one that cannot be moved stays and is passed over at each start."""
        target = self.root / "quarantine" / f"{folder.parent.name}-{folder.name}-{time.time_ns():x}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
            logger.warning("stored %s %s is damaged (%s): moved to quarantine", folder.parent.name, folder.name, reason)
        except OSError:
            logger.warning("stored %s %s is damaged (%s): passed over", folder.parent.name, folder.name, reason)

    def _roots(self) -> list[Path]:
        return [self.root] if self._private is None else [self.root, self._private]

    def _checked(self, folder: Path) -> Artifact | None:
        if not folder.is_dir():
            return None
        reason = why_damaged(folder)
        if reason is not None:
            # Another process may have replaced it in the meantime: what is there now decides.
            with process_lock(self.root / "locks" / "quarantine", 10.0, "quarantine"):
                reason = why_damaged(folder) if folder.is_dir() else "gone"
                if reason not in (None, "gone"):
                    self.quarantine(folder, str(reason))
            if reason is not None:
                return None
        try:
            manifest = _manifest(folder)
        except (OSError, ValueError):
            return None
        with contextlib.suppress(OSError):
            if time.time() - (folder / MANIFEST_NAME).stat().st_mtime > _TOUCH_INTERVAL_S:
                os.utime(folder / MANIFEST_NAME)
        return Artifact(folder, manifest)


def why_damaged(folder: Path) -> str | None:
    """What is wrong with an artifact: the file and the reason, or None."""
    try:
        manifest = _manifest(folder)
    except (OSError, ValueError) as error:
        return f"{MANIFEST_NAME}: {error}"
    if (manifest.kind, manifest.key) != (folder.parent.name, folder.name):
        return f"{MANIFEST_NAME} belongs to {manifest.kind} {manifest.key}"
    for name, record in manifest.files.items():
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            return f"{name}: {error.strerror}"
        if hashlib.sha256(data).hexdigest() != record.sha256:
            return f"{name} fails its checksum"
    return None


def remove_stale_temporaries(root: Path) -> None:
    """Delete what killed processes left half written."""
    for folder in _children(root / "tmp"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_TEMPORARY_S:
                shutil.rmtree(folder, ignore_errors=True)


def _manifest(folder: Path) -> Manifest:
    return Manifest.decode((folder / MANIFEST_NAME).read_bytes())


def _folders(parent: Path) -> list[Path]:
    return [folder for folder in _children(parent) if is_key(folder.name) and folder.is_dir()]


def _children(parent: Path) -> list[Path]:
    try:
        return sorted(parent.iterdir())
    except OSError:
        return []


def _write(root: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Path:
    """Write a folder beside its place and rename it there; the folder that holds the artifact now."""
    folder = root / manifest.kind / manifest.key
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
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
