"""What an artifact says about itself: what it depends on, which files it has, how it was made."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import msgspec

MANIFEST_NAME = "manifest.json"
FORMAT = 1  # raised whenever the meaning of a manifest changes; other formats are made again

SECONDS = "seconds"  # the fact in ``built`` that no two makings share

_KEY_LENGTH = 32
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


class FileRecord(msgspec.Struct, frozen=True):
    """One file of an artifact."""

    sha256: str
    num_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of ``manifest.json``.

    Attributes:
        kind: ``plan``, ``weights``, ``cpp``, ``triton``, ``tokenizer`` or ``choices``.
        label: for people: what it is.
        factors: everything that decides the files' contents, by name; the key is their hash.
        files: by name.
        built: facts about the making that are no factor (versions of tools, seconds), and of a plan the checkpoint
            layout that it foresees.
    """

    kind: str
    label: str
    factors: dict[str, Any]
    files: dict[str, FileRecord]
    built: dict[str, Any]
    format: int = FORMAT

    @property
    def key(self) -> str:
        """The name of the artifact's folder."""
        return artifact_key(self.kind, self.factors)

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(record.num_bytes for record in self.files.values())

    def equals(self, other: Manifest) -> bool:
        """Whether both were made from the same things, by the same tools, with the same result."""
        facts = [{name: fact for name, fact in m.built.items() if name != SECONDS} for m in (self, other)]
        return (self.key, self.files, facts[0]) == (other.key, other.files, facts[1])

    def encode(self) -> bytes:
        """Readable JSON that ends with a checksum of the rest."""
        content = msgspec.to_builtins(self)
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1, sort_keys=True).encode()

    @staticmethod
    def decode(data: bytes) -> Manifest:
        """The manifest in ``data``.

        Raises:
            ValueError: it is not JSON, not a manifest, of another format, or fails its checksum; or it holds names
                that are no file names, or texts that a terminal would not just show.
        """
        try:
            content = json.loads(data)
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
            if content.pop("checksum", None) != _checksum(content):
                raise ValueError("it fails its checksum")
            is_printable = _is_printable(content)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        manifest = msgspec.convert(content, Manifest)
        if manifest.format != FORMAT:
            raise ValueError(f"it has format {manifest.format}, this version reads {FORMAT}")
        if not is_printable or not all(map(FILE_NAME.fullmatch, manifest.files)):
            raise ValueError("it holds characters that no manifest of ours has")
        return manifest


def artifact_key(kind: str, factors: dict[str, Any]) -> str:
    """The folder name for a set of factors."""
    return hashlib.sha256(_canonical([kind, factors])).hexdigest()[:_KEY_LENGTH]


def is_key(name: str) -> bool:
    """Whether a folder's name has the form of a key."""
    return len(name) == _KEY_LENGTH and set(name) <= set("0123456789abcdef")


def _is_printable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_printable(key) and _is_printable(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(_is_printable, value))
    return value.isprintable() if isinstance(value, str) else True


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
