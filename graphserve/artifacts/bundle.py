"""Artifacts in one file: a ``.tar.zst`` whose first member lists what follows.

The same artifacts give the same bytes: members are sorted and carry no time, user or mode. Reading trusts nothing:
members are regular files named ``kind/key/file``, every artifact must be what its manifest says, and no more memory is
taken than one artifact may have, nor more disk than a store may.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from graphserve.artifacts.eviction import LIMIT_VARIABLE, limit_bytes
from graphserve.artifacts.manifest import FILE_NAME, MANIFEST_NAME, Manifest, artifact_key
from graphserve.artifacts.store import KINDS, Artifact, ArtifactStore, load_artifact, why_damaged
from graphserve.errors import ConfigError

SUFFIX = ".tar.zst"
_INDEX = "bundle.json"
_LEVEL = 9
_MEMBER = re.compile(rf"({'|'.join(KINDS)})/([0-9a-f]{{32}})/({FILE_NAME.pattern})")
_MAX_ARTIFACT_BYTES = 1 << 30  # a plan with its constants has some MiB; more than this is an attack or a mistake


def export_bundle(artifacts: Iterable[Artifact], path: Path) -> int:
    """Write artifacts to ``path``, whole or not at all; returns how many.

    Raises:
        ConfigError: an artifact is damaged or was deleted meanwhile, or the file cannot be written.
    """
    chosen = sorted(artifacts, key=lambda artifact: (artifact.manifest.kind, artifact.manifest.key))
    index = [[a.manifest.kind, a.manifest.key] for a in chosen]
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as raw:
                compressor = zstandard.ZstdCompressor(level=_LEVEL)
                with compressor.stream_writer(raw, closefd=False) as stream, tarfile.open(None, "w|", stream) as tar:
                    _add(tar, _INDEX, json.dumps(index).encode())
                    for artifact in chosen:
                        _add_artifact(tar, artifact.folder)
                raw.flush()
                os.fsync(raw.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
    return len(chosen)


def import_bundle(path: Path, store: ArtifactStore) -> int:
    """Add a bundle's artifacts to a store, those that it lacks or has damaged; returns how many were added.

    Raises:
        ConfigError: the file cannot be read, is no bundle, is cut off, unpacks to more than a store may hold, or an
            artifact in it is not what its manifest says. What came before that is in the store.
    """
    added = 0
    try:
        with (
            path.open("rb") as raw,
            zstandard.ZstdDecompressor().stream_reader(raw) as unpacked,
            tarfile.open(None, "r|", _Limited(unpacked, path, limit_bytes()), tarinfo=_PlainMember) as tar,
        ):
            wanted = {key for key in _index(tar, path) if why_damaged(store.root.joinpath(*key)) is not None}
            if not wanted:
                return 0
            for manifest, files in _artifacts(tar, path):
                if (manifest.kind, manifest.key) in wanted:
                    store.put(manifest.kind, manifest.factors, files, manifest.label, manifest.built)
                    wanted.remove((manifest.kind, manifest.key))
                    added += 1
    except (OSError, tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise ConfigError(f"bundle {path} cannot be read: {error}") from error
    if wanted:
        raise ConfigError(f"bundle {path} is cut off: {len(wanted)} of the artifacts that it lists are not in it")
    return added


class _Limited(io.RawIOBase):
    """Reads up to so many bytes of a stream that nobody knows the length of."""

    def __init__(self, stream: zstandard.ZstdDecompressionReader, path: Path, max_bytes: int) -> None:
        self._stream, self._path, self._max_bytes = stream, path, max_bytes
        self._left = max_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ConfigError(
                f"bundle {self._path} unpacks to more than the {self._max_bytes} bytes that a store is kept below: "
                f"set {LIMIT_VARIABLE} higher if you trust its maker"
            )
        return data


class _PlainMember(tarfile.TarInfo):
    """A header that is refused before anything of its member is read, unless it is that of a regular file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _PlainMember:
        member = super().frombuf(buf, encoding, errors)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ConfigError(f"bundle: member {member.name!r} does not belong into a store: it is no regular file")
        return member


def _index(tar: tarfile.TarFile, path: Path) -> list[tuple[str, str]]:
    member = tar.next()
    if member is None or member.name != _INDEX:
        raise ConfigError(f"{path} is no bundle of graphserve: make one with graphserve cache export")
    try:
        index = json.loads(_read(tar, member, path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"bundle {path}: its list of contents is damaged: {error}") from None
    if not isinstance(index, list) or not all(map(_is_entry, index)):
        raise ConfigError(f"bundle {path}: its list of contents is damaged")
    return [(kind, key) for kind, key in index]


def _is_entry(entry: object) -> bool:
    """Whether it is ``[kind, key]``."""
    return isinstance(entry, list) and _MEMBER.fullmatch("/".join([*map(str, entry), "x"])) is not None


def _artifacts(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[Manifest, dict[str, bytes]]]:
    """Every artifact with its checked contents. A manifest comes before its files."""
    manifest: Manifest | None = None
    files: dict[str, bytes] = {}
    while (member := tar.next()) is not None:
        match = _MEMBER.fullmatch(member.name)
        if match is None:
            raise ConfigError(f"bundle {path}: member {member.name!r} does not belong into a store")
        kind, key, name = match.groups()
        if name == MANIFEST_NAME:
            try:
                manifest, files = Manifest.decode(_read(tar, member, path)), {}
            except ValueError as error:
                raise ConfigError(f"bundle {path}: {member.name}: {error}") from None
            if manifest.num_bytes > _MAX_ARTIFACT_BYTES:
                raise ConfigError(f"bundle {path}: {member.name} claims {manifest.num_bytes} bytes")
        if manifest is None or (kind, key) != (manifest.kind, artifact_key(manifest.kind, manifest.factors)):
            raise ConfigError(f"bundle {path}: {member.name} does not follow its manifest")
        if name != MANIFEST_NAME:
            record = manifest.files.get(name)
            data = _read(tar, member, path) if record is not None and record.num_bytes == member.size else b""
            if record is None or hashlib.sha256(data).hexdigest() != record.sha256:
                raise ConfigError(f"bundle {path}: {member.name} fails its checksum")
            files[name] = data
        if files.keys() == manifest.files.keys():
            yield manifest, files


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    file = tar.extractfile(member) if member.size <= _MAX_ARTIFACT_BYTES else None
    if file is None:
        raise ConfigError(f"bundle {path}: {member.name} claims {member.size} bytes")
    return file.read()


def _add_artifact(tar: tarfile.TarFile, folder: Path) -> None:
    artifact = load_artifact(folder)
    if isinstance(artifact, str):
        if not folder.is_dir():
            raise ConfigError(f"{folder} was deleted while it was exported: run the export again")
        raise ConfigError(f"{folder} is damaged ({artifact}): run graphserve cache verify, then warmup again")
    name = f"{artifact.manifest.kind}/{artifact.manifest.key}"
    _add(tar, f"{name}/{MANIFEST_NAME}", artifact.manifest.encode())
    for file in sorted(artifact.manifest.files):
        _add(tar, f"{name}/{file}", artifact.read(file))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
