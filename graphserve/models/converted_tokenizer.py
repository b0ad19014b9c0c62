"""A tokenizer that transformers had to convert, kept as an artifact so that it is converted once.

tokenizer  tokenizer.json        what the tokenizers library reads
           special_tokens.json   bos_token, eos_token, ... → text
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import tokenizers

from graphserve.artifacts.store import ArtifactStore
from graphserve.errors import ConfigError

logger = logging.getLogger(__name__)

NUM_CHECKED_TEXTS = 10_000

_TOKENIZER_FILE, _SPECIAL_FILE = "tokenizer.json", "special_tokens.json"
_FORMAT = 1  # raised whenever the way of converting changes

# Everything in a checkpoint's folder that a conversion may read.
_SOURCE_NAMES = ("config.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SOURCE_PATTERNS = ("*.model", "vocab.*", "tekken.json")

# Letters, digits, punctuation, accents, Greek, Cyrillic, Chinese, emoji, combining marks, spaces and controls.
_RANGES = ((32, 126), (160, 383), (880, 1023), (1024, 1279), (0x4E00, 0x4EFF), (0x1F600, 0x1F64F), (0x300, 0x36F))
_SPACES = (" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u200b")

Converted = tuple[tokenizers.Tokenizer, dict[str, str]]


def conversion_factors(folder: Path) -> dict[str, Any]:
    """Everything a conversion depends on: contents of the files, and transformers."""
    files = {folder / name for name in _SOURCE_NAMES}
    files.update(path for pattern in _SOURCE_PATTERNS for path in folder.glob(pattern))
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files) if p.is_file()}
    return {"files": hashes, "transformers": metadata.version("transformers"), "format": _FORMAT}


def load_converted(store: ArtifactStore, folder: Path) -> Converted | None:
    """The stored conversion of a folder's tokenizer, or None."""
    artifact = store.find("tokenizer", conversion_factors(folder))
    if artifact is None:
        return None
    backend = tokenizers.Tokenizer.from_str(artifact.read(_TOKENIZER_FILE).decode())
    return backend, json.loads(artifact.read(_SPECIAL_FILE))


def save_converted(store: ArtifactStore, folder: Path, converted: Converted) -> None:
    """Store a conversion, once it was shown that its stored form gives the same ids.

    Raises:
        ConfigError: it does not.
    """
    backend, special = converted
    text = backend.to_str()
    difference = first_difference(backend, tokenizers.Tokenizer.from_str(text))
    if difference is not None:
        raise ConfigError(
            f"{folder}: the converted tokenizer does not survive being stored, it encodes {difference!r} otherwise: "
            "give a checkpoint with tokenizer.json"
        )
    files = {_TOKENIZER_FILE: text.encode(), _SPECIAL_FILE: json.dumps(special).encode()}
    label = f"tokenizer of {backend.get_vocab_size()} entries"
    try:
        store.put("tokenizer", conversion_factors(folder), files, label)
    except OSError as error:
        logger.warning("%s could not be stored: %s", label, error)


def first_difference(
    one: tokenizers.Tokenizer, other: tokenizers.Tokenizer, num_texts: int = NUM_CHECKED_TEXTS
) -> str | None:
    """The first of many texts that two tokenizers encode otherwise, or decode otherwise; None if there is none."""
    texts = list(_texts(one, num_texts))
    for text, first, second in zip(texts, one.encode_batch(texts), other.encode_batch(texts), strict=True):
        if first.ids != second.ids or one.decode(first.ids) != other.decode(second.ids):
            return text
    return None


def _texts(tokenizer: tokenizers.Tokenizer, count: int) -> Iterator[str]:
    """Texts of the vocabulary's own pieces, of characters from many scripts, and of both; the same in every run."""
    chance = random.Random(0)
    pieces = sorted(tokenizer.get_vocab(with_added_tokens=True))
    for number in range(count):
        words = []
        for _ in range(chance.randint(1, 8)):
            if number % 3 != 0:
                words.append(chance.choice(pieces))
            if number % 3 != 1:
                low, high = chance.choice(_RANGES)
                words.append("".join(chr(chance.randint(low, high)) for _ in range(chance.randint(1, 6))))
            words.append(chance.choice(_SPACES) if chance.random() < 0.5 else "")
        yield "".join(words)
