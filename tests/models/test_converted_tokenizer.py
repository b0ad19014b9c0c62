"""Converted tokenizers: converted once, the same ids ever after, and transformers is not needed again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models
from transformers import LlamaTokenizer

from graphserve.artifacts import ArtifactStore
from graphserve.errors import CacheMissError, ConfigError
from graphserve.models.converted_tokenizer import (
    NUM_CHECKED_TEXTS,
    conversion_factors,
    first_difference,
    load_converted,
    save_converted,
)
from graphserve.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=["mistral-v1-sp", "mistral-v3-sp"])
def folder(request: pytest.FixtureRequest, shared_tokenizers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published sentencepiece tokenizer without its tokenizer.json."""
    pytest.importorskip("sentencepiece")
    copy = tmp_path_factory.mktemp("tokenizer") / request.param
    shutil.copytree(shared_tokenizers / request.param, copy, ignore=shutil.ignore_patterns("tokenizer.json"))
    if not list(copy.glob("*.model*")):
        pytest.skip(f"{request.param} has no sentencepiece model")
    return copy


def test_the_stored_form_gives_the_ids_of_transformers_on_ten_thousand_texts(folder: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    first = load_tokenizer(folder, store=store)
    stored = load_converted(store, folder)
    assert stored is not None and NUM_CHECKED_TEXTS >= 10_000
    assert first_difference(LlamaTokenizer.from_pretrained(folder).backend_tokenizer, stored[0]) is None
    again = load_tokenizer(folder, store=ArtifactStore(tmp_path, is_strict=True))
    assert (again.eos_token_id, again.bos_token_id) == (first.eos_token_id, first.bos_token_id)
    assert again.all_special_ids == first.all_special_ids and again.special_tokens == first.special_tokens


def test_a_stored_conversion_needs_no_transformers(folder: Path, tmp_path: Path) -> None:
    load_tokenizer(folder, store=ArtifactStore(tmp_path))
    code = (
        "import sys\nfrom pathlib import Path\nfrom graphserve.artifacts import ArtifactStore\n"
        "from graphserve.models.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(folder)!r}, store=ArtifactStore(Path({str(tmp_path)!r}))).encode('a')\n"
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


def test_a_changed_file_is_another_conversion(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"one")
    before = conversion_factors(tmp_path)
    (tmp_path / "readme.txt").write_text("no source of a tokenizer")
    assert conversion_factors(tmp_path) == before
    (tmp_path / "tokenizer.model").write_bytes(b"two")
    assert conversion_factors(tmp_path) != before


def test_a_conversion_that_would_change_when_stored_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "graphserve.models.converted_tokenizer.tokenizers.Tokenizer.from_str",
        lambda text: words("b", "a"),
        raising=False,
    )
    with pytest.raises(ConfigError, match="does not survive being stored"):
        save_converted(ArtifactStore(tmp_path / "store"), tmp_path, (words("a", "b"), {}))
