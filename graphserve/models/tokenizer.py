"""A checkpoint's tokenizer: text to ids and back, special tokens, chat template.

With a ``tokenizer.json`` only the `tokenizers` library is needed, so a server's front process stays free of
transformers; other formats (sentencepiece, vocab + merges, tiktoken) are converted by transformers once at load.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from graphserve.artifacts import ArtifactStore, open_store
from graphserve.errors import ConfigError, RequestError
from graphserve.models.chat_template_files import read_chat_templates, resolve_chat_template
from graphserve.models.converted_tokenizer import (
    Converted,
    conversion_factors,
    convert_sentencepiece,
    find_sentencepiece,
    save_converted,
    stored_conversion,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Files that transformers can make a tokenizer from when there is no tokenizer.json.
CONVERTIBLE_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "tiktoken.model", "tekken.json", "vocab.txt")


class Tokenizer:
    """Encodes, decodes and renders chats for one model.

    ``backend`` is the ``tokenizers.Tokenizer`` (for ``tokenizers.decoders.DecodeStream``); its truncation and padding
    are off. ``all_special_ids`` are those that ``skip_special_tokens`` leaves out. ``special_tokens`` maps
    ``bos_token``, ``eos_token``, ... to texts; only tokens that exist have an entry.
    Safe to use from several threads: nothing changes after construction.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = {key: token for key, token in special_tokens.items() if token}
        self.chat_templates = dict(chat_templates or {})
        backend.no_truncation()
        backend.no_padding()
        self.all_special_ids: list[int] = sorted(
            index for index, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.pad_token_id = self._id_of("pad_token")

    @property
    def vocab_size(self) -> int:
        """Number of ids including added tokens; a model's embedding may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with ``add_special_tokens`` also the BOS/EOS that the tokenizer's template adds.

        Raises:
            RequestError: the text holds lone surrogates, which UTF-8 cannot encode.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(f"prompt is not valid Unicode text: {error}", param="prompt") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; unfinished UTF-8 shows as U+FFFD. Spaces are kept as the model wrote them.

        Raises:
            RequestError: an id is negative or does not fit 32 bits.
        """
        try:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise RequestError(f"token ids must be between 0 and {self.vocab_size - 1}: {error}", "prompt") from error

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Prompt text of a chat. It holds its own special tokens: encode it with ``add_special_tokens=False``.

        Args:
            messages: dicts with ``role`` and ``content``.
            add_generation_prompt: end with the opening of the assistant's turn.
            chat_template: Jinja text, or the name of one of ``chat_templates`` (None: the model's own).
            continue_final_message: leave the last message open instead.
            tools: JSON schemas of callable tools.
            documents: documents for retrieval templates.
            kwargs: further variables of the template, such as ``enable_thinking``.

        Raises:
            RequestError: the model has no template and none was given, or the template refused the messages.
        """
        from graphserve.models.chat_template import render_chat  # with it Jinja, which only chats need

        return render_chat(
            self._template(chat_template, has_tools=tools is not None),
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            variables={**self.special_tokens, **kwargs},
        )

    def _template(self, given: str | None, has_tools: bool) -> str:
        if given is not None:
            return self.chat_templates.get(given, given)
        if has_tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" in self.chat_templates:
            return self.chat_templates["default"]
        named = f" It has the named templates {', '.join(self.chat_templates)}." if self.chat_templates else ""
        raise RequestError(
            f"this model has no default chat template, so chat messages cannot be turned into a prompt.{named} Use "
            "plain completions, or give a template (option chat_template: a file or Jinja text)",
            param="messages",
        )

    def _id_of(self, key: str) -> int | None:
        text = self.special_tokens.get(key)
        return None if text is None else self.backend.token_to_id(text)


def load_tokenizer(
    model_dir: str | Path, chat_template: str | None = None, store: ArtifactStore | None = None
) -> Tokenizer:
    """Load the tokenizer of a folder.

    Args:
        model_dir: folder with ``tokenizer.json``, or with files that transformers can convert.
        chat_template: a file or Jinja text that replaces the checkpoint's default template.
        store: where a converted tokenizer is kept, so that transformers is needed once; the user's cache by default.

    Raises:
        ConfigError: no tokenizer files, or unreadable ones; says what was looked for.
        CacheMissError: it has to be converted, was not before, and the store is strict.
    """
    folder = Path(model_dir)
    replaced = {"default": resolve_chat_template(chat_template)} if chat_template is not None else {}
    if (folder / "tokenizer.json").is_file():
        return _load_native(folder, replaced)
    present = convertible_files(folder)
    if not present:
        raise ConfigError(
            f"{folder} has no tokenizer: looked for tokenizer.json, {', '.join(CONVERTIBLE_FILES)}. Copy the "
            "tokenizer files beside the model, name another folder with tokenizer=, or pass skip_tokenizer_init=True "
            "and token ids as prompts"
        )
    store = store if store is not None else open_store()
    converted = _load_converted(store, folder)
    if converted is None:
        with store.lock("tokenizer", conversion_factors(folder)):
            converted = _load_converted(store, folder)
            if converted is None:
                store.begin_build(f"the converted tokenizer of {folder}")
                converted = _convert_folder(folder, present)
                save_converted(store, folder, converted)
    backend, special = converted
    templates = {**read_chat_templates(folder, _read_json(folder / "tokenizer_config.json")), **replaced}
    return Tokenizer(backend, special, templates)


def convertible_files(folder: Path) -> list[str]:
    """Files of a folder without ``tokenizer.json`` that transformers can make a tokenizer from."""
    if (folder / "tokenizer.json").is_file():
        return []
    return [name for name in CONVERTIBLE_FILES if (folder / name).is_file()]


def _load_native(folder: Path, replaced_templates: Mapping[str, str]) -> Tokenizer:
    """tokenizer.json, plus the special tokens that only the JSON files beside it declare."""
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        # Older checkpoints: the map holds what tokenizer_config.json lacks, and wins.
        config |= _read_json(folder / "special_tokens_map.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for every malformed file
        message = f"{folder / 'tokenizer.json'} cannot be read by tokenizers {tokenizers.__version__}: {error}"
        raise ConfigError(message) from error
    declared = config.get("added_tokens_decoder") or {}
    for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            backend.add_tokens([tokenizers.AddedToken(**token)])
    special = {key: _content(config.get(key)) for key in SPECIAL_TOKEN_KEYS}
    # Further *_token entries (image_token, ...) are variables of templates as well.
    special |= {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        special |= {key: _content(value) for key, value in extra.items()}
        extra = []
    named = {key: text for key, text in special.items() if text}
    texts = [*named.values(), *(text for token in extra if (text := _content(token)))]
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in texts])
    templates = {**read_chat_templates(folder, config), **replaced_templates}
    return Tokenizer(backend, named, templates)


def _load_converted(store: ArtifactStore, folder: Path) -> Converted | None:
    """The stored conversion of a folder's tokenizer, or None."""
    stored = stored_conversion(store, folder)
    if stored is None:
        return None
    text, special = stored
    try:
        return tokenizers.Tokenizer.from_str(text), special
    except Exception as error:  # the library raises bare Exception for whatever it does not know
        reader = f"tokenizers {tokenizers.__version__}"
        logger.warning("the stored tokenizer of %s counts as missing, %s cannot read it: %s", folder, reader, error)
        return None


def _convert_folder(folder: Path, present: list[str]) -> Converted:
    logger.info("%s has no tokenizer.json: converting %s", folder, present[0])
    loaded = _load_by_transformers(folder, present)
    backend: tokenizers.Tokenizer = loaded.backend_tokenizer
    config = _read_json(folder / "tokenizer_config.json")
    sentencepiece = find_sentencepiece(folder, config)
    if sentencepiece is not None:
        # Without "legacy": False, the default of transformers 5.
        backend = convert_sentencepiece(folder, backend, sentencepiece, is_legacy=bool(config.get("legacy")))
    special = {key: str(value) for key, value in loaded.special_tokens_map.items() if isinstance(value, str)}
    return backend, special


def _load_by_transformers(folder: Path, present: list[str]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        needs = "; sentencepiece models need: pip install 'graphserve[sentencepiece]'"
        raise ConfigError(
            f"{folder} has no tokenizer.json, and transformers cannot convert {', '.join(present)}: {error}"
            + (needs if "tokenizer.model" in present else "")
        ) from error
    if not isinstance(getattr(loaded, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise ConfigError(
            f"{folder}: {type(loaded).__name__} has no form that the tokenizers library can run: give a checkpoint "
            "with tokenizer.json"
        )
    return loaded


def _content(token: Any) -> str | None:
    """Text of a special token, which files write as a string or as an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
