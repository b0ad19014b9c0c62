"""From what a caller gives (prompt, sampling parameters) to requests the engine core takes, or a refusal."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from graphserve.engine.request import EngineCoreRequest
from graphserve.errors import RequestError
from graphserve.runtime.step_input import splitmix64
from graphserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from graphserve.models.tokenizer import Tokenizer

# Text, token ids, or a dict with "prompt" or "prompt_token_ids" (with both, the ids count and the text is echoed).
Prompt = str | Sequence[int] | Mapping[str, Any]

MAX_BAD_WORDS_TOKENS = 1024


class ModelLimits(msgspec.Struct, frozen=True):
    """Facts about model and engine that requests are held against."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    eos_token_ids: tuple[int, ...]
    seed: int


class ProcessedInput(msgspec.Struct):
    """A valid request: one core request for each of the ``n`` completions, in their order."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    core_requests: list[EngineCoreRequest]


class InputProcessor:
    """Tokenizes, checks and fans out. Safe to use from several threads.

    Args:
        tokenizer: None if the engine runs without one.
        limits: what requests may ask for.
    """

    def __init__(self, tokenizer: Tokenizer | None, limits: ModelLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._seed_numbers = itertools.count()

    def with_seed(self, params: SamplingParams) -> SamplingParams:
        """``params`` with a seed: its own, or the next one of the engine's reproducible series."""
        if params.seed is not None or params.is_greedy:
            return params
        drawn = splitmix64(splitmix64(self._limits.seed & (2**64 - 1)) + next(self._seed_numbers))
        return params.clone(seed=drawn >> 2)  # leaves room for + index, and is never -1

    def process(self, request_id: str, prompt: Prompt, params: SamplingParams) -> ProcessedInput:
        """Make the core requests of one request.

        Raises:
            RequestError: the prompt or a parameter cannot be served by this model; the message says why.
        """
        params = self.with_seed(params)
        text, token_ids = self._tokenize(prompt)
        self._check_prompt(token_ids)
        self._check_params(params)
        room = self._limits.max_model_len - len(token_ids)
        core_requests = [
            EngineCoreRequest(
                request_id=request_id if params.n == 1 else f"{index}_{request_id}",
                prompt_token_ids=token_ids,
                # The completions share the prompt, so its log-probabilities are computed once.
                params=params if index == 0 else params.clone(prompt_logprobs=None),
                max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
                seed=(params.seed or 0) + index,
                eos_token_ids=[] if params.ignore_eos else list(self._limits.eos_token_ids),
                bad_words_token_ids=self._bad_words(params.bad_words or []),
            )
            for index in range(params.n)
        ]
        return ProcessedInput(request_id, text, token_ids, params, core_requests)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(
                    "the prompt is text, the engine has no tokenizer (skip_tokenizer_init=True): give prompt_token_ids",
                    param="prompt",
                )
            return prompt, self._tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            return self._tokenize_mapping(prompt)
        return None, _token_ids(prompt)

    def _tokenize_mapping(self, prompt: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
        if unknown:
            raise RequestError(
                f"unknown prompt field {unknown[0]}={prompt[unknown[0]]!r}: allowed are prompt and prompt_token_ids",
                param="prompt",
            )
        text = prompt.get("prompt")
        if text is not None and not isinstance(text, str):
            raise RequestError(f"prompt={text!r} is not allowed: it must be a string", param="prompt")
        if prompt.get("prompt_token_ids") is not None:
            return text, _token_ids(prompt["prompt_token_ids"])
        if text is None:
            raise RequestError("the prompt has neither prompt nor prompt_token_ids: give one", param="prompt")
        return self._tokenize(text)

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt has no tokens: give at least one", param="prompt")
        vocab_size, max_len = self._limits.vocab_size, self._limits.max_model_len
        wrong = next((t for t in token_ids if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise RequestError(f"prompt token id {wrong} is not in the vocabulary, 0 to {vocab_size - 1}", "prompt")
        if len(token_ids) >= max_len:
            raise RequestError(
                f"prompt has {len(token_ids)} tokens, max_model_len is {max_len} and at least one token is to be "
                f"generated: shorten it to {max_len - 1} tokens or raise max_model_len",
                param="prompt",
            )

    def _check_params(self, params: SamplingParams) -> None:
        most = self._limits.max_logprobs
        for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if count is not None and most != -1 and not 0 <= count <= most:
                raise RequestError(f"{name}={count} is not allowed: it must be in 0..{most} (max_logprobs)", name)
        for name, ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            wrong = next((t for t in ids or () if t >= self._limits.vocab_size), None)
            if wrong is not None:
                raise RequestError(
                    f"{name} holds token id {wrong}; the vocabulary is 0 to {self._limits.vocab_size - 1}",
                    param=name,
                )
        if self._tokenizer is None:
            for name in ("stop", "bad_words"):
                if getattr(params, name):
                    raise RequestError(
                        f"{name}={getattr(params, name)!r} needs a tokenizer and the engine was started with "
                        "skip_tokenizer_init=True: use stop_token_ids or logit_bias",
                        param=name,
                    )

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences of the words as they stand at the start of a text and after a space."""
        sequences: list[list[int]] = []
        for word in words:
            assert self._tokenizer is not None, "checked in _check_params"
            for text in (word.lstrip(" ") or word, " " + word.lstrip(" ")):
                ids = self._tokenizer.encode(text, add_special_tokens=False)
                if ids and ids not in sequences:
                    sequences.append(ids)
        total = sum(map(len, sequences))
        if total > MAX_BAD_WORDS_TOKENS:
            raise RequestError(f"bad_words are {total} tokens, at most {MAX_BAD_WORDS_TOKENS} are allowed", "bad_words")
        return sequences


def _token_ids(prompt: object) -> list[int]:
    """Plain ints from any sequence of integers (numpy arrays and torch tensors too)."""
    try:
        return [operator.index(token_id) for token_id in prompt]  # type: ignore[attr-defined]
    except TypeError:
        raise RequestError(
            f"a prompt of type {type(prompt).__name__} is not allowed: give text, a list of token ids, or a dict with "
            "prompt or prompt_token_ids",
            param="prompt",
        ) from None
