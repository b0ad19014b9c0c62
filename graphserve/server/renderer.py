"""From prompts and conversations to token ids, off the event loop.

Templates come from the model's folder only; a client's ``chat_template_kwargs`` are scalars. Rendering and tokenising
run in a small thread pool, so that a long prompt does not hold up the other streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import tokenizers

from graphserve.artifacts import open_store
from graphserve.engine.messages import TokenizerSource
from graphserve.errors import RequestError
from graphserve.models.tokenizer import Tokenizer, load_tokenizer
from graphserve.server.errors import bad_request

_NUM_THREADS = 2

# Names of the template call itself: as template variables they would replace the server's template or its choices.
_RESERVED_KWARGS = frozenset(
    ["messages", "add_generation_prompt", "chat_template", "continue_final_message", "tools", "documents"]
)


def make_tokenizer(source: TokenizerSource) -> Tokenizer | None:
    """This process's own tokenizer, None when the engine runs without one.

    Raises:
        ConfigError: its files cannot be read.
        CacheMissError: the folder has lost its tokenizer.json since the engine named it.
    """
    if source.converted is not None:
        backend = tokenizers.Tokenizer.from_str(source.converted.json)
        return Tokenizer(backend, source.converted.special_tokens, source.converted.chat_templates)
    if source.folder is None:
        return None
    # Strict: this process never converts a tokenizer, which would import transformers and torch.
    return load_tokenizer(source.folder, store=open_store(is_strict=True))


class RenderedPrompt(msgspec.Struct):
    """Token ids of one prompt; ``text`` is None when a client sent ids and did not ask for the text."""

    token_ids: list[int]
    text: str | None


class Renderer:
    """Tokenises for one model.

    Args:
        tokenizer: None when the engine runs without one; then prompts must be token ids.
        vocab_size: ids at or above it are refused.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="renderer")

    async def tokenize(
        self, prompts: Sequence[str | list[int]], add_special_tokens: bool, needs_text: bool
    ) -> list[RenderedPrompt]:
        """Token ids of texts, and of token ids themselves; with ``needs_text`` ids are also decoded.

        Raises:
            ApiError: 400 for an empty prompt, an id outside the vocabulary, or a text without a tokenizer.
        """
        return await self._run(self._tokenize, prompts, add_special_tokens, needs_text)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        add_special_tokens: bool,
        template_kwargs: dict[str, Any],
    ) -> RenderedPrompt:
        """Apply the model's chat template and tokenise the result.

        Raises:
            ApiError: 400 when the model has no template, or the template refuses the conversation.
        """
        return await self._run(self._render_chat, messages, add_generation_prompt, add_special_tokens, template_kwargs)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def _require_tokenizer(self, field: str) -> Tokenizer:
        if self._tokenizer is None:
            raise bad_request("this server runs without a tokenizer: send token ids as prompt", field)
        return self._tokenizer

    def _tokenize(
        self, prompts: Sequence[str | list[int]], add_special_tokens: bool, needs_text: bool
    ) -> list[RenderedPrompt]:
        rendered = []
        for prompt in prompts:
            if isinstance(prompt, str):
                ids = self._require_tokenizer("prompt").encode(prompt, add_special_tokens=add_special_tokens)
                rendered.append(RenderedPrompt(ids, prompt))
            else:
                self._check_ids(prompt)
                text = None
                if needs_text:
                    text = self._require_tokenizer("echo").decode(prompt, skip_special_tokens=False)
                rendered.append(RenderedPrompt(prompt, text))
            if not rendered[-1].token_ids:
                raise bad_request("the prompt is empty: it has no token", "prompt")
        return rendered

    def _render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        add_special_tokens: bool,
        template_kwargs: dict[str, Any],
    ) -> RenderedPrompt:
        tokenizer = self._require_tokenizer("messages")
        if reserved := sorted(_RESERVED_KWARGS & template_kwargs.keys()):
            raise bad_request(f"chat_template_kwargs cannot set {reserved[0]}", f"chat_template_kwargs.{reserved[0]}")
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, **template_kwargs
            )
        except RequestError as error:
            raise bad_request(str(error), error.param or "messages") from None
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not ids:
            raise bad_request("the conversation renders to an empty prompt", "messages")
        return RenderedPrompt(ids, text)

    def _check_ids(self, ids: list[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self._vocab_size:
                raise bad_request(f"prompt: token id {token_id} is not in 0 to {self._vocab_size - 1}", "prompt")
