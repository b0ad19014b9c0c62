"""Artifacts in one file: a ``.tar.zst`` whose first member lists what follows.

The same artifacts give the same bytes: members are sorted and carry no time, user or mode. Reading trusts nothing:
names must have the form ``kind/key/file``, and every artifact must be what its manifest says.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from graphserve.artifacts.manifest import MANIFEST_NAME, Manifest, artifact_key
from graphserve.artifacts.store import KINDS, Artifact, ArtifactStore, why_damaged
from graphserve.errors import ConfigError

SUFFIX = ".tar.zst"
_INDEX = "bundle.json"
_LEVEL = 9
_MEMBER = re.compile(rf"({'|'.join(KINDS)})/([0-9a-f]{{32}})/([A-Za-z0-9_][A-Za-z0-9_.\-]*)")
_MAX_ARTIFACT_BYTES = 1 << 30  # a plan with its constants has some MiB; more than this is an attack or a mistake


def export_bundle(artifacts: Iterable[Artifact], path: Path) -> int:
    """Write artifacts to ``path``, whole or not at all; returns how many.

    Raises:
        ConfigError: an artifact is damaged, or the file cannot be written.
    """
    chosen = sorted(artifacts, key=lambda artifact: (artifact.manifest.kind, artifact.manifest.key))
    for artifact in chosen:
        if (reason := why_damaged(artifact.folder)) is not None:
            raise ConfigError(
                f"{artifact.folder} is damaged ({reason}): run graphserve cache verify, then warmup again"
            )
    index = [[a.manifest.kind, a.manifest.key] for a in chosen]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as raw:
            try:
                compressor = zstandard.ZstdCompressor(level=_LEVEL)
                with compressor.stream_writer(raw, closefd=False) as stream, tarfile.open(None, "w|", stream) as tar:
                    _add(tar, _INDEX, json.dumps(index).encode())
                    for artifact in chosen:
                        folder = f"{artifact.manifest.kind}/{artifact.manifest.key}"
                        _add(tar, f"{folder}/{MANIFEST_NAME}", (artifact.folder / MANIFEST_NAME).read_bytes())
                        for name in sorted(artifact.manifest.files):
                            _add(tar, f"{folder}/{name}", artifact.read(name))
                raw.flush()
                os.fsync(raw.fileno())
                Path(raw.name).replace(path)
            finally:
                Path(raw.name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
    return len(chosen)


def import_bundle(path: Path, store: ArtifactStore) -> int:
    """Add a bundle's artifacts to a store, those that it lacks; returns how many were added.

    Raises:
        ConfigError: the file cannot be read, is no bundle, or an artifact in it is not what its manifest says.
    """
    try:
        with (
            path.open("rb") as raw,
            zstandard.ZstdDecompressor().stream_reader(raw) as stream,
            tarfile.open(None, "r|", stream) as tar,
        ):
            wanted = [key for key in _index(tar, path) if not (store.root / key[0] / key[1]).is_dir()]
            if not wanted:
                return 0
            for manifest, files in _artifacts(tar, path):
                if [manifest.kind, manifest.key] in wanted:
                    store.put(manifest.kind, manifest.factors, files, manifest.label, manifest.built)
            return len(wanted)
    except (OSError, tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise ConfigError(f"bundle {path} cannot be read: {error}") from error


def _index(tar: tarfile.TarFile, path: Path) -> list[list[str]]:
    member = tar.next()
    if member is None or member.name != _INDEX or not member.isreg():
        raise ConfigError(f"{path} is no bundle of graphserve: make one with graphserve cache export")
    try:
        index = json.loads(_read(tar, member, path))
    except ValueError as error:
        raise ConfigError(f"bundle {path}: its list of contents is damaged: {error}") from None
    if not isinstance(index, list) or not all(map(_is_entry, index)):
        raise ConfigError(f"bundle {path}: its list of contents is damaged")
    return index


def _is_entry(entry: object) -> bool:
    """Whether it is ``[kind, key]``."""
    return isinstance(entry, list) and _MEMBER.fullmatch("/".join([*map(str, entry), "x"])) is not None


def _artifacts(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[Manifest, dict[str, bytes]]]:
    """Every artifact with its checked contents. A manifest comes before its files."""
    manifest: Manifest | None = None
    files: dict[str, bytes] = {}
    while (member := tar.next()) is not None:
        match = _MEMBER.fullmatch(member.name)
        if match is None or not member.isreg():
            raise ConfigError(f"bundle {path}: member {member.name!r} does not belong into a store")
        kind, key, name = match.groups()
        data = _read(tar, member, path)
        if name == MANIFEST_NAME:
            try:
                manifest, files = Manifest.decode(data), {}
            except ValueError as error:
                raise ConfigError(f"bundle {path}: {member.name}: {error}") from None
        if manifest is None or (kind, key) != (manifest.kind, artifact_key(manifest.kind, manifest.factors)):
            raise ConfigError(f"bundle {path}: {member.name} does not follow its manifest")
        if name != MANIFEST_NAME:
            record = manifest.files.get(name)
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


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
