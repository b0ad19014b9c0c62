"""Converted tokenizers: the ids of the original, converted once, and transformers is not needed again.

The original of a ``.model`` file is sentencepiece, with which the model was trained; the tokenizer.json files that are
published for such models (made by transformers 4) order merges as it does. transformers 5 does not.
"""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from graphserve.artifacts import ArtifactStore
from graphserve.engine.detokenizer import IncrementalDecoder
from graphserve.errors import CacheMissError, ConfigError
from graphserve.models import converted_tokenizer
from graphserve.models.converted_tokenizer import (
    NUM_CHECKED_TEXTS,
    PROBES,
    comparable_texts,
    conversion_factors,
    convert_sentencepiece,
    find_sentencepiece,
    first_difference,
    first_sentencepiece_difference,
    random_texts,
    save_converted,
    sentencepiece_texts,
    stored_conversion,
)
from graphserve.models.tokenizer import Tokenizer, load_tokenizer

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def write_folder(folder: Path, model: bytes, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA | (config or {})))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def original(folder: Path, adds_prefix: bool | None = None) -> Any:
    """The SentencePieceProcessor of a folder's tokenizer.model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    proto = find_sentencepiece(folder, {})
    assert proto is not None
    if adds_prefix is not None:
        proto.normalizer_spec.add_dummy_prefix = adds_prefix
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


@pytest.fixture(scope="module", params=["mistral-v1-sp", "mistral-v3-sp"])
def folder(request: pytest.FixtureRequest, shared_tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published sentencepiece tokenizer without its tokenizer.json."""
    pytest.importorskip("sentencepiece")
    model = (shared_tokenizers / request.param / "tokenizer.model").read_bytes()
    return write_folder(tmp_path_factory.mktemp("tokenizer") / request.param, model)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """Shared by the tests that do not mind who converted."""
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions are checked quickly."""
    monkeypatch.setattr(converted_tokenizer, "NUM_CHECKED_TEXTS", 500)


@pytest.fixture
def converted(folder: Path, store: ArtifactStore) -> Tokenizer:
    return load_tokenizer(folder, store=store)


# --- ids and texts of published models -------------------------------------------------------------------------------


def plain_texts(folder: Path, repository: Path, model: Any) -> dict[str, list[str]]:
    """Texts by kind. None holds a token that chat templates write: those have a test of their own."""
    proto = find_sentencepiece(folder, {})
    random = list(sentencepiece_texts(proto, NUM_CHECKED_TEXTS, seed=1))
    code = [path.read_text(encoding="utf-8")[:3000] for path in sorted((repository / "graphserve").rglob("*.py"))]
    lines = [line for text in code for line in text.splitlines()][:4000]
    kinds = {
        "random": random,
        "leading and trailing spaces": [
            " " * (1 + i % 3) + text + " " * (i % 4) for i, text in enumerate(random[:4000])
        ],
        "indented": [text.replace("\n", "\n" + " " * (i % 20)) for i, text in enumerate(random[:4000])],
        "files of code": code,
        "lines of code": lines,
        "runs of spaces": [before + " " * n + after for n in range(80) for before in ("", "x") for after in ("", "y")],
        "probes": list(PROBES),
    }
    symbols = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)]
    special = re.compile("|".join(map(re.escape, symbols)))
    return {kind: [text for text in texts if not special.search(text)] for kind, texts in kinds.items()}


def test_ids_and_texts_equal_sentencepiece_on_more_than_ten_thousand_texts(
    folder: Path, store: ArtifactStore, repository: Path
) -> None:
    load_tokenizer(folder, store=store)
    tokenizer = load_tokenizer(folder, store=ArtifactStore(store.root, is_strict=True))  # the stored form
    model = original(folder)
    kinds = plain_texts(folder, repository, model)
    assert len(kinds["random"]) > 0.99 * NUM_CHECKED_TEXTS >= 9_900 and sum(map(len, kinds.values())) > 20_000
    for kind, texts in kinds.items():
        expected = model.encode(texts)
        encodings = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
        differing = [text for text, e, ids in zip(texts, encodings, expected, strict=True) if e.ids != ids]
        assert not differing, f"{len(differing)} of {len(texts)} {kind} differ: {differing[:3]}"
        decoded = tokenizer.backend.decode_batch(expected)
        assert decoded == [text.replace("\u2581", " ") for text in texts] == model.decode(expected)


def test_the_conversion_of_transformers_alone_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees what went wrong: transformers 5 merges spaces first and drops a leading one."""
    from transformers import LlamaTokenizer

    proto, backend = find_sentencepiece(folder, {}), LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    assert first_sentencepiece_difference(backend, proto, ["Hello world", "a  b", "x"]) == "a  b"
    assert first_sentencepiece_difference(backend, proto, ["x", " hello"]) == " hello"
    assert first_sentencepiece_difference(backend, proto, list(sentencepiece_texts(proto, 100))) is not None
    monkeypatch.setattr(converted_tokenizer, "_rebuild", lambda loaded, proto, is_legacy: loaded)
    with pytest.raises(ConfigError, match="encodes or decodes ' ' otherwise than sentencepiece: give a checkpoint"):
        convert_sentencepiece(folder, backend, proto, is_legacy=False)


@pytest.mark.parametrize("text, ids", [("a  b", [264, 28705, 287]), (" hello", [28705, 6312, 28709])])
def test_published_ids_of_mistral(
    text: str, ids: list[int], shared_tokenizers: Path, tmp_path: Path, store: ArtifactStore, few_texts: None
) -> None:
    """What mistral-common 1.13.1 gives, and BPE with the merges of Mistral-7B-v0.1's tokenizer.json."""
    pytest.importorskip("sentencepiece")
    folder = write_folder(tmp_path, (shared_tokenizers / "mistral-v1-sp" / "tokenizer.model").read_bytes())
    assert load_tokenizer(folder, store=store).encode(text) == [1, *ids]


@pytest.mark.parametrize("is_legacy", [False, True])
def test_special_tokens_in_text_are_one_token_and_legacy_says_whether_a_space_follows(
    folder: Path, is_legacy: bool, tmp_path: Path, few_texts: None
) -> None:
    copy = write_folder(tmp_path / "copy", (folder / "tokenizer.model").read_bytes(), {"legacy": is_legacy})
    tokenizer = load_tokenizer(copy, store=ArtifactStore(tmp_path / "store"))
    first, later = original(copy), original(copy, adds_prefix=is_legacy)
    assert first.encode("<s>") != [1]  # for sentencepiece it is text like any other
    expected = [*first.encode("a  b"), 1, *later.encode("[x]  hi"), 2, *later.encode(" there "), 2]
    assert tokenizer.encode("a  b<s>[x]  hi</s> there </s>", add_special_tokens=False) == expected
    if first.is_control(3):
        assert tokenizer.encode("[INST]  x[/INST]", add_special_tokens=False) == [3, *later.encode("  x"), 4]
    assert tokenizer.encode(" x") == [1, *first.encode(" x")] and tokenizer.encode("") == [1]
    assert tokenizer.all_special_ids[:3] == [0, 1, 2] and tokenizer.eos_token_id == 2


def test_the_config_may_forbid_the_prefix(folder: Path, tmp_path: Path, few_texts: None) -> None:
    copy = write_folder(tmp_path / "copy", (folder / "tokenizer.model").read_bytes(), {"add_prefix_space": False})
    tokenizer = load_tokenizer(copy, store=ArtifactStore(tmp_path / "store"))
    for text in ("hello there", " hello", "  a  b"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == original(copy, adds_prefix=False).encode(text) and tokenizer.decode(ids) == text


def test_text_grows_token_by_token_without_losing_a_space(folder: Path, converted: Tokenizer) -> None:
    proto, model = find_sentencepiece(folder, {}), original(folder)
    texts = comparable_texts(converted.backend, proto, [*PROBES, *sentencepiece_texts(proto, 300, seed=2)])
    for number, text in enumerate(texts):
        ids = model.encode(text)
        count = number % 8 if number % 8 < len(ids) else 0  # of the prompt
        prompt = [1, *ids[:count]] if number % 2 else ids[:count]
        before = converted.decode(prompt)
        if before.endswith("\ufffd") or (before + " ").startswith("\ufffd"):
            continue
        decoder = IncrementalDecoder(converted.decode, prompt)
        shown = "".join(map(decoder.push, ids[count:])) + decoder.flush()
        assert before + shown == text.replace("\u2581", " "), (text, count)


# --- other kinds of sentencepiece models, made here ------------------------------------------------------------------

LINES = [
    "The quick brown fox",
    "jumps over   the lazy dog",
    "def f(x):",
    "    return x + 1",
    "héllo wörld",
    "你好 世界",
]
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "bytes": EXACT | {"byte_fallback": True},
    "no bytes": EXACT,
    "no prefix": EXACT | {"byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": ["<b>", "\n\n"]},
    "symbols": EXACT | {"byte_fallback": True, "user_defined_symbols": ["<b>"], "control_symbols": ["[C]"]},
    "stripping": {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
    "nfkc": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False, "byte_fallback": True},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
}


@pytest.fixture(scope="module")
def train(repository: Path) -> Callable[..., bytes]:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [*LINES * 20, *(repository / "README.md").read_text(encoding="utf-8").splitlines()]

    def make(**options: Any) -> bytes:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            minloglevel=2,
            **{"vocab_size": 600, "hard_vocab_limit": False} | options,
        )
        return out.getvalue()

    return make


@pytest.mark.parametrize("kind, is_legacy", [*((kind, False) for kind in KINDS), ("bytes", True), ("symbols", True)])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_each_kind_of_model_gives_the_ids_of_sentencepiece(
    model_type: str, kind: str, is_legacy: bool, train: Callable[..., bytes], tmp_path: Path, few_texts: None
) -> None:
    folder = write_folder(tmp_path, train(model_type=model_type, **KINDS[kind]), {"legacy": is_legacy})
    tokenizer = load_tokenizer(folder, store=ArtifactStore(tmp_path / "store"))
    model, proto = original(folder), find_sentencepiece(folder, {})
    texts = [*sentencepiece_texts(proto, 1000, seed=3), "a<b>c", "<b> x", "x  <b>", "\n\n\n", *LINES]
    compared = comparable_texts(tokenizer.backend, proto, texts)
    assert len(compared) > 500
    assert first_sentencepiece_difference(tokenizer.backend, proto, compared) is None
    assert tokenizer.encode("lazy fox") == [1, *model.encode("lazy fox")]
    assert tokenizer.decode(tokenizer.encode("lazy fox dog")) == "lazy fox dog"


def test_spaces_that_are_user_defined_symbols_are_found_in_text(
    train: Callable[..., bytes], tmp_path: Path, few_texts: None
) -> None:
    """Gemma's: each run of spaces is a symbol, which sentencepiece finds before it merges anything."""
    symbols = ["\u2581" * n for n in range(2, 8)]
    options = EXACT | {"byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": symbols}
    folder = write_folder(tmp_path, train(model_type="bpe", **options))
    tokenizer, model = load_tokenizer(folder, store=ArtifactStore(tmp_path / "store")), original(folder)
    for text in ("a" + " " * n + after for n in range(30) for after in ("", "the", "\u2581\u2581 x")):
        assert tokenizer.encode(text) == [1, *model.encode(text)]


def test_equally_likely_segmentations_are_no_difference_and_others_are(
    train: Callable[..., bytes], tmp_path: Path, few_texts: None
) -> None:
    folder = write_folder(tmp_path, train(model_type="unigram", **KINDS["bytes"]))
    tokenizer, proto = load_tokenizer(folder, store=ArtifactStore(tmp_path / "store")), find_sentencepiece(folder, {})
    assert first_sentencepiece_difference(tokenizer.backend, proto, ["lazy fox"]) is None
    proto.pieces[original(folder).encode("lazy fox")[0]].score -= 100
    assert first_sentencepiece_difference(tokenizer.backend, proto, ["lazy fox"]) == "lazy fox"


@pytest.mark.parametrize(
    "options, config, reason",
    [
        ({"treat_whitespace_as_suffix": True}, {}, "does not write spaces in front of words"),
        ({"model_type": "char"}, {}, "is neither a BPE nor a unigram model"),
        ({}, {"tokenizer_class": "XLMRobertaTokenizer"}, r"calls token \d+ .*, but transformers"),
    ],
    ids=["suffix", "char", "numbers"],
)
def test_models_that_cannot_be_converted_faithfully_are_refused(
    options: dict[str, Any],
    config: dict[str, Any],
    reason: str,
    train: Callable[..., bytes],
    tmp_path: Path,
    few_texts: None,
) -> None:
    folder = write_folder(tmp_path, train(**options), config)
    if config:
        (folder / "config.json").write_text('{"model_type": "xlm-roberta"}')
    with pytest.raises(ConfigError, match=f"{reason}.*: give a checkpoint with tokenizer.json"):
        load_tokenizer(folder, store=ArtifactStore(tmp_path / "store"))


def test_a_file_of_that_name_that_is_no_sentencepiece_model_is_left_to_transformers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("aGVsbG8= 0\nd29ybGQ= 1\n")
    assert find_sentencepiece(tmp_path, {}) is None


# --- the stored form -------------------------------------------------------------------------------------------------


def test_the_stored_form_is_the_first_one(folder: Path, tmp_path: Path, few_texts: None) -> None:
    first = load_tokenizer(folder, store=ArtifactStore(tmp_path))
    again = load_tokenizer(folder, store=ArtifactStore(tmp_path, is_strict=True))
    assert first.backend is not again.backend and first_difference(first.backend, again.backend, 500) is None
    assert (again.eos_token_id, again.bos_token_id) == (first.eos_token_id, first.bos_token_id)
    assert again.all_special_ids == first.all_special_ids and again.special_tokens == first.special_tokens


def test_a_stored_conversion_needs_no_transformers(folder: Path, store: ArtifactStore, converted: Tokenizer) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom graphserve.artifacts import ArtifactStore\n"
        "from graphserve.models.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(folder)!r}, store=ArtifactStore(Path({str(store.root)!r}))).encode('a')\n"
        "print([m for m in ('transformers', 'torch', 'sentencepiece') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_strict_store_converts_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheMissError, match="converted tokenizer"):
        load_tokenizer(folder, store=ArtifactStore(tmp_path, is_strict=True))


def words(*known: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(("?", *known))}, unk_token="?"))


def test_the_comparison_finds_a_difference() -> None:
    assert first_difference(words("a", "b"), words("a", "b"), 100) is None
    assert first_difference(words("a", "b"), words("b", "a"), 100) is not None


def test_texts_are_the_same_for_the_same_seed() -> None:
    assert list(random_texts(["\u2581a", "b"], 50)) == list(random_texts(["\u2581a", "b"], 50))
    assert list(random_texts(["\u2581a", "b"], 50)) != list(random_texts(["\u2581a", "b"], 50, seed=1))


def test_a_changed_file_or_library_or_way_of_converting_is_another_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"one")
    before = conversion_factors(tmp_path)
    (tmp_path / "readme.txt").write_text("no source of a tokenizer")
    assert conversion_factors(tmp_path) == before and before["format"] > 1
    (tmp_path / "tokenizer.model").write_bytes(b"two")
    assert conversion_factors(tmp_path) != before
    (tmp_path / "tokenizer.model").write_bytes(b"one")
    monkeypatch.setattr(converted_tokenizer.metadata, "version", lambda name: f"another {name}")
    assert conversion_factors(tmp_path) != before


def test_conversions_of_an_older_way_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"one")
    store = ArtifactStore(tmp_path / "store")
    with monkeypatch.context() as older:
        older.setattr(converted_tokenizer, "_FORMAT", 1)
        save_converted(store, tmp_path, (words("a"), {}))
        assert stored_conversion(store, tmp_path) is not None
    assert stored_conversion(store, tmp_path) is None


def test_a_conversion_that_would_change_when_stored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "graphserve.models.converted_tokenizer.tokenizers.Tokenizer.from_str",
        lambda text: words("b", "a"),
        raising=False,
    )
    with pytest.raises(ConfigError, match="does not survive being stored"):
        save_converted(ArtifactStore(tmp_path / "store"), tmp_path, (words("a", "b"), {}))


def test_a_stored_conversion_that_cannot_be_read_counts_as_missing(
    train: Callable[..., bytes], tmp_path: Path, few_texts: None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path, train(model_type="bpe", **KINDS["bytes"]))
    root = tmp_path / "store"
    unreadable = {"tokenizer.json": b'{"version": "9.0"}', "special_tokens.json": b"{}"}
    ArtifactStore(root).put("tokenizer", conversion_factors(folder), unreadable, "of another version")
    with caplog.at_level(logging.WARNING), pytest.raises(CacheMissError, match="converted tokenizer"):
        load_tokenizer(folder, store=ArtifactStore(root, is_strict=True))
    assert f"the stored tokenizer of {folder} counts as missing, tokenizers {tokenizers.__version__}" in caplog.text
    assert load_tokenizer(folder, store=ArtifactStore(root)).encode("lazy") != [1]
    load_tokenizer(folder, store=ArtifactStore(root, is_strict=True))
