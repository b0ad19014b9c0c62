"""A tokenizer that had to be converted, kept as an artifact so that it is converted once.

tokenizer  tokenizer.json        what the tokenizers library reads
           special_tokens.json   bos_token, eos_token, ... → text

Of a sentencepiece model transformers gives the special tokens, their numbers and the template; what text becomes is
built here from the model file, because transformers 5 orders the merges of a BPE model by id where sentencepiece (and
transformers 4, which made the tokenizer.json files that are published) takes the piece of the highest score, and drops
the first of a text's leading spaces. sentencepiece is the authority: the model was trained with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from graphserve.artifacts.store import ArtifactStore
from graphserve.errors import ConfigError

logger = logging.getLogger(__name__)

NUM_CHECKED_TEXTS = 10_000

_TOKENIZER_FILE, _SPECIAL_FILE = "tokenizer.json", "special_tokens.json"
_FORMAT = 2  # raised whenever the way of converting changes

# Everything in a checkpoint's folder that a conversion may read.
_SOURCE_NAMES = ("config.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SOURCE_PATTERNS = ("*.model", "vocab.*", "tekken.json")

# Letters, digits, punctuation, accents, Greek, Cyrillic, Chinese, emoji, combining marks, spaces and controls.
_RANGES = ((32, 126), (160, 383), (880, 1023), (1024, 1279), (0x4E00, 0x4EFF), (0x1F600, 0x1F64F), (0x300, 0x36F))
_SPACES = (" ", "  ", "\n", "\t", "\r\n", "\n    ", "\n\t", "\u00a0", "\u200b")

# What conversions got wrong: spaces at either end and in runs, indentation, digits, scripts, bytes without a piece.
_EDGES = ("", " ", "  ", "       ", "\n", "\t", "\n    ", "\r\n")
_CORES = (
    *("Hello world", "a  b", "a   b" + 19 * " " + "c", "1234567.89 0x1F 10 000", "don't <stop> [INST] hi [/INST]"),
    *("def f(x):\n    return x + 1", "\tif (a) {\n\t\tb();\n\t}", '{"a": [1, 2]}', "https://example.org/?q=1&r=%20"),
    *("你好，世界。日本語 한국어", "Привет Ωμέγα naïve", "👩‍👩‍👧 🙂 🧿", "\x01\x7f\u0378\ue000\U0010ffff", "<0x0A>"),
)
PROBES = tuple(before + core + after for core in ("", *_CORES) for before in _EDGES for after in _EDGES)

# Kinds of a sentencepiece model (TrainerSpec.ModelType) and of its pieces (SentencePiece.Type).
_UNIGRAM, _BPE = 1, 2
_NORMAL, _USER_DEFINED, _UNUSED, _BYTE = 1, 4, 5, 6
_SPACE = "\u2581"  # how a space is written in a piece

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")

Converted = tuple[tokenizers.Tokenizer, dict[str, str]]


def conversion_factors(folder: Path) -> dict[str, Any]:
    """Everything a conversion depends on: contents of the files, and the libraries that made and checked it."""
    files = {folder / name for name in _SOURCE_NAMES}
    files.update(path for pattern in _SOURCE_PATTERNS for path in folder.glob(pattern))
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files) if p.is_file()}
    versions = {name: metadata.version(name) for name in ("transformers", "tokenizers")}
    return {"files": hashes, **versions, "format": _FORMAT}


def stored_conversion(store: ArtifactStore, folder: Path) -> tuple[str, dict[str, str]] | None:
    """The stored conversion of a folder's tokenizer, as the text of a tokenizer.json and special tokens, or None."""
    artifact = store.find("tokenizer", conversion_factors(folder))
    if artifact is None:
        return None
    return artifact.read(_TOKENIZER_FILE).decode(), json.loads(artifact.read(_SPECIAL_FILE))


def save_converted(store: ArtifactStore, folder: Path, converted: Converted) -> None:
    """Store a conversion, once it was shown that its stored form gives the same ids.

    Raises:
        ConfigError: it does not.
    """
    backend, special = converted
    text = backend.to_str()
    difference = first_difference(backend, tokenizers.Tokenizer.from_str(text), NUM_CHECKED_TEXTS)
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


def first_difference(one: tokenizers.Tokenizer, other: tokenizers.Tokenizer, num_texts: int) -> str | None:
    """The first of many texts that two tokenizers encode otherwise, or decode otherwise; None if there is none."""
    texts = list(random_texts(sorted(one.get_vocab(with_added_tokens=True)), num_texts))
    first, second = ([encoding.ids for encoding in tokenizer.encode_batch(texts)] for tokenizer in (one, other))
    for text, *pair in zip(texts, first, second, one.decode_batch(first), other.decode_batch(second), strict=True):
        if pair[0] != pair[1] or pair[2] != pair[3]:
            return text
    return None


def random_texts(pieces: Sequence[str], count: int, seed: int = 0) -> Iterator[str]:
    """Texts of a vocabulary's pieces, of characters from many scripts, and of both; the same for the same seed."""
    chance = random.Random(seed)
    for number in range(count):
        words = []
        for _ in range(chance.randint(1, 8)):
            if number % 3 != 0:
                words.append(chance.choice(pieces))
            if number % 3 != 1:
                low, high = chance.choice(_RANGES)
                words.append("".join(chr(chance.randint(low, high)) for _ in range(chance.randint(1, 6))))
            words.append(chance.choice(_SPACES) if chance.random() < 0.5 else "")
        text = "".join(words)
        yield text if number % 4 == 0 else text.replace(_SPACE, " ")


# --- sentencepiece models --------------------------------------------------------------------------------------------


def find_sentencepiece(folder: Path, config: Mapping[str, Any]) -> Any | None:
    """The sentencepiece model (a ``ModelProto``) of a folder, or None if it has none.

    Args:
        config: the folder's tokenizer_config.json; ``add_prefix_space: false`` in it overrules the model.
    """
    try:
        import sentencepiece
    except ImportError:  # transformers has read the folder without it, so there is no sentencepiece model
        return None
    from transformers.convert_slow_tokenizer import import_protobuf

    for path in (folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()):
        data = path.read_bytes()
        try:
            sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:  # tiktoken's files have the same name
            continue
        proto = import_protobuf().ModelProto.FromString(data)
        if config.get("add_prefix_space") is False:
            proto.normalizer_spec.add_dummy_prefix = False
        return proto
    return None


def convert_sentencepiece(
    folder: Path, loaded: tokenizers.Tokenizer, proto: Any, is_legacy: bool
) -> tokenizers.Tokenizer:
    """A sentencepiece model as the tokenizers library runs it, shown to give its ids and texts.

    Args:
        folder: for messages.
        loaded: transformers' conversion, whose added tokens and post-processor are kept.
        proto: the model.
        is_legacy: the ``legacy`` of tokenizer_config.json: whether text after a special token begins with a space, as
            the whole text does. Chat templates are written for the one or the other.

    Raises:
        ConfigError: the model has what tokenizers cannot do, transformers numbers its tokens otherwise, or a text is
            encoded or decoded otherwise than by sentencepiece; names the first such text.
    """
    if (reason := _why_unsupported(loaded, proto)) is not None:
        raise ConfigError(f"{folder}: the sentencepiece model {reason}: give a checkpoint with tokenizer.json")
    converted = _rebuild(loaded, proto, is_legacy)
    for index, token in loaded.get_added_tokens_decoder().items():
        if converted.token_to_id(token.content) != index:
            raise ConfigError(
                f"{folder}: the token {token.content!r} cannot be number {index} of the converted tokenizer: give a "
                "checkpoint with tokenizer.json"
            )
    texts = [*PROBES, *sentencepiece_texts(proto, NUM_CHECKED_TEXTS)]
    text = first_sentencepiece_difference(converted, proto, texts)
    if text is not None:
        raise ConfigError(
            f"{folder}: the converted tokenizer encodes or decodes {text!r} otherwise than sentencepiece: give a "
            "checkpoint with tokenizer.json"
        )
    if proto.normalizer_spec.precompiled_charsmap:
        name = proto.normalizer_spec.name
        logger.warning("%s: text with combining marks may be normalized (%s) otherwise than in training", folder, name)
    return converted


def sentencepiece_texts(proto: Any, count: int, seed: int = 0) -> Iterator[str]:
    """Random texts of the pieces that stand for ordinary text, and of characters."""
    return random_texts([piece.piece for piece in proto.pieces if piece.type == _NORMAL], count, seed)


def first_sentencepiece_difference(converted: tokenizers.Tokenizer, proto: Any, texts: Sequence[str]) -> str | None:
    """The first text that a conversion encodes or decodes otherwise than its sentencepiece model; None if none is."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = comparable_texts(converted, proto, texts)
    encodings = [encoding.ids for encoding in converted.encode_batch(texts, add_special_tokens=False)]
    expected = model.encode(texts)
    decoded, expected_texts = converted.decode_batch(expected), model.decode(expected)
    for text, ids, right, back, back_right in zip(texts, encodings, expected, decoded, expected_texts, strict=True):
        if ids != right and not _is_tie(proto, ids, right):
            return text
        # The one leaves unknown text out, the other writes a sign for it.
        if back != back_right and model.unk_id() not in right:
            return text
    return None


def comparable_texts(converted: tokenizers.Tokenizer, proto: Any, texts: Sequence[str]) -> list[str]:
    """Those texts for which sentencepiece says what is right.

    Left out are texts with

    - added tokens: sentencepiece encodes "<s>" as four characters, chat templates need the one token; user-defined
      symbols of a model that adds a prefix, which tokenizers finds before there is one;
    - names of bytes ("<0x0A>") for unigram models: tokenizers takes them for the pieces of that name;
    - combining marks for models with a character map: tokenizers applies it to a character with its marks at once;
    - U+2581 for models that strip spaces: sentencepiece strips it in decoding.
    """
    spec, types = proto.normalizer_spec, [piece.type for piece in proto.pieces]
    has_exact_symbols = not spec.add_dummy_prefix and not spec.remove_extra_whitespaces
    literals = [
        token.content
        for index, token in converted.get_added_tokens_decoder().items()
        if index >= len(types) or types[index] != _USER_DEFINED or not has_exact_symbols
    ]
    if proto.trainer_spec.model_type == _UNIGRAM:
        literals += [piece.piece for piece in proto.pieces if piece.type == _BYTE]
    if spec.remove_extra_whitespaces:
        literals.append(_SPACE)
    excluded = re.compile("|".join(map(re.escape, literals)) or "(?!)")
    kept = [text for text in texts if not excluded.search(text)]
    if not spec.precompiled_charsmap:
        return kept
    return [text for text in kept if not any(unicodedata.category(char).startswith("M") for char in text)]


def _is_tie(proto: Any, one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a unigram model finds two segmentations equally likely; rounding then decides, in 32 or in 64 bits."""
    if proto.trainer_spec.model_type != _UNIGRAM:
        return False
    first, second = (math.fsum(proto.pieces[index].score for index in ids) for ids in (one, other))
    return math.isclose(first, second, rel_tol=1e-6)


def _why_unsupported(loaded: tokenizers.Tokenizer, proto: Any) -> str | None:
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        return "is neither a BPE nor a unigram model"
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        return "does not write spaces in front of words"
    if proto.denormalizer_spec.precompiled_charsmap:
        return "changes characters when it decodes"
    if any(piece.type == _UNUSED for piece in proto.pieces):
        return "has unused pieces"
    added = loaded.get_added_tokens_decoder()
    for index, piece in enumerate(proto.pieces):
        name = loaded.id_to_token(index)
        if name != piece.piece and index not in added:
            return f"calls token {index} {piece.piece!r}, but transformers {name!r}"
    return None


def _rebuild(loaded: tokenizers.Tokenizer, proto: Any, is_legacy: bool) -> tokenizers.Tokenizer:
    spec = proto.normalizer_spec
    # The first part of a text is known by its offset in it, which normalizers that drop characters change.
    is_first_known = not spec.remove_extra_whitespaces and not spec.name.startswith("nmt")
    prefixes_first, steps = is_first_known and not is_legacy, _normalizers(spec)
    if spec.add_dummy_prefix and not prefixes_first:
        steps.append(normalizers.Prepend(_SPACE))
    converted = tokenizers.Tokenizer(_model(loaded, proto))
    converted.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if spec.add_dummy_prefix and prefixes_first:
        # Metaspace adds no prefix before its own sign, as sentencepiece does before leading spaces: hence first with
        # a sign that normalized text does not hold.
        first = pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False)
        then = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False)
        converted.pre_tokenizer = pre_tokenizers.Sequence([first, then])
    converted.decoder = _decoder(proto)
    added = [token for _, token in sorted(loaded.get_added_tokens_decoder().items())]
    # Runs of spaces (Gemma's user-defined symbols) are found by the model, whichever way a text writes a space.
    converted.add_tokens([token for token in added if set(token.content) != {_SPACE}])
    if loaded.post_processor is not None:
        converted.post_processor = loaded.post_processor
    return converted


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        precompiled = normalizers.Precompiled(spec.precompiled_charsmap)
        if precompiled.normalize_str("\r") == precompiled.normalize_str("\n"):
            steps.append(normalizers.Replace("\r\n", "\n\n"))  # tokenizers maps the pair like its first character
        steps.append(precompiled)
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(rf"\A +|[ {_SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    return steps


def _model(loaded: tokenizers.Tokenizer, proto: Any) -> models.Model:
    """The segmentation; names of tokens that a tokenizer_config.json has given to placeholders are kept."""
    trainer = proto.trainer_spec
    names = [str(loaded.id_to_token(index)) for index in range(len(proto.pieces))]
    if trainer.model_type == _UNIGRAM:
        scored = [(name, piece.score) for name, piece in zip(names, proto.pieces, strict=True)]
        return models.Unigram(scored, trainer.unk_id, trainer.byte_fallback)
    ids = {name: index for index, name in enumerate(names)}
    merges, unknown = _merges(proto, ids), names[trainer.unk_id]
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)


def _merges(proto: Any, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces, those that make the piece of the highest score first.

    Of equal scores (the runs of spaces of Llama and Mistral) sentencepiece merges the leftmost pair, so that a run
    grows from the left; the longest left part first does the same. User-defined symbols come before everything and
    are not merged further.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = [piece for piece in proto.pieces if piece.piece in ids]
    symbols = {piece.piece for piece in pieces if piece.type == _USER_DEFINED}
    scores = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL} | dict.fromkeys(symbols, math.inf)
    merges = generate_merges({name: ids[name] for name in scores}, scores)
    return [(left, right) for left, right in merges if left + right in symbols or not symbols & {left, right}]


def _decoder(proto: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
