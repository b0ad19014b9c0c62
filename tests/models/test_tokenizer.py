"""Tokenizers give the ids, texts and chat prompts that transformers gives, without importing it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graphserve.errors import ConfigError, RequestError
from graphserve.models.tokenizer import Tokenizer, load_tokenizer

SHARED = [
    "models/stories260K",
    "models/stories260K-mixtral-exact",
    "models/stories-qwen3-chat",
    "models/stories-qwen3-moe",
    "tokenizers/gpt-neox-20b",
    "tokenizers/gpt2",
    "tokenizers/qwen2.5",
]
TEXTS = [
    "Once upon a time, there was a girl.",
    "  two  spaces\n\n\tand tabs ",
    "héllo 日本語 👩‍👩‍👧 \u200d ﬁ",
    "<s> </s> <unk> <|im_start|>user\nhi<|im_end|><|endoftext|>",
    "don't , . ! ? isn't 's",
    "1234567 0.5 1e-5",
    "",
    "\x00\x01\u2581",
]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi there"}]},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " <|im_end|> é"}]},
    {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "reasoning_content": "easy", "content": "2"},
            {"role": "user", "content": "sure?"},
        ],
        "enable_thinking": False,
    },
    {
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"é": "<b>&'"}}}],
    },
    {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The answer is"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
]


@pytest.fixture(scope="module", params=SHARED)
def pair(request: pytest.FixtureRequest, repository: Path) -> tuple[Tokenizer, Any]:
    """Our tokenizer and transformers' for one folder; loading a large one takes seconds."""
    path = repository.parent / "shared" / request.param
    if not path.is_dir():
        pytest.skip(f"needs ../shared/{request.param} beside the repository")
    return load_tokenizer(path), AutoTokenizer.from_pretrained(path)


def test_ids_and_texts_equal_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    for text in TEXTS:
        for add_special_tokens in (True, False):
            ids = reference.encode(text, add_special_tokens=add_special_tokens)
            assert ours.encode(text, add_special_tokens) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip), text


def test_special_tokens_and_size_equal_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    assert ours.eos_token_id == reference.eos_token_id and ours.bos_token_id == reference.bos_token_id
    assert ours.vocab_size == len(reference)
    assert set(reference.all_special_ids) <= set(ours.all_special_ids)
    assert reference.special_tokens_map.items() >= ours.special_tokens.items()


@pytest.mark.parametrize("chat", CHATS, ids=["plain", "system", "reasoning", "tools", "continue"])
def test_chat_prompts_equal_transformers(chat: dict[str, Any], pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    if reference.chat_template is None:
        with pytest.raises(RequestError, match="no default chat template"):
            ours.apply_chat_template(**chat)
        return
    arguments = dict(chat)
    options = {"add_generation_prompt": True} | arguments
    expected = reference.apply_chat_template(options.pop("messages"), tokenize=False, **options)
    assert ours.apply_chat_template(**arguments) == expected


def test_neither_torch_nor_transformers_is_imported(shared_models: Path) -> None:
    code = (
        "import sys; from graphserve.models.tokenizer import load_tokenizer\n"
        f"tokenizer = load_tokenizer({str(shared_models / 'stories-qwen3-chat')!r})\n"
        "tokenizer.apply_chat_template([{'role': 'user', 'content': 'x'}]); tokenizer.encode('x')\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- a small tokenizer made here -------------------------------------------------------------------------------------


def byte_level(**options: Any) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    if options.get("adds_bos"):
        made.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 256)])
    return made


def save(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any], **files: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", **config}))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def assert_equals_transformers(folder: Path, text: str) -> Tokenizer:
    ours, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode(text) == reference.encode(text)
    assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text), skip_special_tokens=True)
    assert (ours.bos_token_id, ours.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    return ours


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("declared", [True, False])
def test_the_post_processor_of_the_file_decides_about_bos(adds_bos: bool, declared: bool, tmp_path: Path) -> None:
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": declared}
    ours = assert_equals_transformers(save(tmp_path, byte_level(adds_bos=adds_bos), config), "hi")
    assert (ours.encode("hi")[0] == 256) is adds_bos
    assert ours.encode("hi", add_special_tokens=False) == ours.encode("hi")[adds_bos:]


def test_tokens_that_only_the_config_declares_are_added(tmp_path: Path) -> None:
    added = {"258": {"content": "<tool>", "special": False}, "259": {"content": "<end>", "special": True}}
    config = {"eos_token": "<end>", "added_tokens_decoder": added, "extra_special_tokens": ["<more>"]}
    ours = assert_equals_transformers(save(tmp_path, byte_level(), config), "a<tool>b<end><more>c")
    assert ours.eos_token_id == 259 and ours.vocab_size == 261
    assert ours.decode(ours.encode("a<tool>b<end><more>c")) == "a<tool>bc"


def test_an_older_special_tokens_map_is_read(tmp_path: Path) -> None:
    token_map = {"bos_token": {"content": "<bos>", "lstrip": False}, "additional_special_tokens": ["<x>"]}
    ours = assert_equals_transformers(save(tmp_path, byte_level(), {}, special_tokens_map=token_map), "a<x>b")
    assert ours.bos_token_id == 256 and ours.decode(ours.encode("a<x>b")) == "ab"


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    assert len(load_tokenizer(save(tmp_path, backend, {})).encode("0123456789")) == 10


def test_text_with_lone_surrogates_is_a_request_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        load_tokenizer(save(tmp_path, byte_level(), {})).encode("a\ud800b")


def test_ids_that_no_vocabulary_has_are_a_request_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="between 0 and 257"):
        load_tokenizer(save(tmp_path, byte_level(), {})).decode([-1])


def test_a_folder_without_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"looked for tokenizer\.json, tokenizer\.model.*skip_tokenizer_init"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"model": 1}'])
def test_a_broken_tokenizer_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_vocab_and_merges_alone_are_converted(shared_tokenizers: Path, tmp_path: Path) -> None:
    source = shared_tokenizers / "qwen2.5"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    converted, native = load_tokenizer(tmp_path), load_tokenizer(source)
    assert converted.eos_token_id == native.eos_token_id
    for text in TEXTS:
        assert converted.encode(text) == native.encode(text)
    chat = [{"role": "user", "content": "x"}]
    assert converted.apply_chat_template(chat) == native.apply_chat_template(chat)


@pytest.mark.parametrize("name", ["mistral-v1-sp", "mistral-v3-sp"])
@pytest.mark.parametrize("model_type", ["mistral", "llama"])
def test_a_sentencepiece_model_alone_is_converted_faithfully(
    name: str, model_type: str, shared_tokenizers: Path, tmp_path: Path
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="converting needs sentencepiece")
    if importlib.util.find_spec("google.protobuf") is None:
        pytest.skip("converting needs protobuf")
    shutil.copy(shared_tokenizers / name / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (
        "Once upon a time",
        "héllo 日本語 👩",
        "don't",
        "a\nb",
        "a  b",
        " two  spaces ",
        "def f(x):\n    return",
    ):
        assert tokenizer.encode(text) == [1, *reference.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 2


def test_a_tokenizer_saved_by_transformers_is_read_back(tmp_path: Path) -> None:
    saved = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template="{{ 1 }}"
    )
    saved.save_pretrained(tmp_path)
    ours = assert_equals_transformers(tmp_path, "hello <pad> there")
    assert ours.pad_token_id == saved.pad_token_id and ours.apply_chat_template([]) == "1"
