"""What a caller may ask of one generation: names, defaults and ranges are vLLM's where the meaning is the same."""

from __future__ import annotations

import difflib
import enum
import logging
import math
import os
from collections.abc import Iterable
from typing import Any

import msgspec

from graphserve.errors import RequestError

logger = logging.getLogger(__name__)

GREEDY_TEMPERATURE = 1e-5  # below it the choice is the argmax
MIN_TEMPERATURE = 1e-2  # sampled logits are divided by the temperature; below this the quotients overflow
MAX_N = int(os.environ.get("GRAPHSERVE_MAX_N_SEQUENCES", "16384"))
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
LOGIT_BIAS_LIMIT = 100.0
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

NOT_SUPPORTED = frozenset(
    {
        "structured_outputs",
        "logprob_token_ids",
        "prompt_logprob_start",
        "prompt_logprob_token_ids",
        "flat_logprobs",
        "stream_interval",
        "extra_args",
        "skip_reading_prefix_cache",
        "thinking_token_budget",
        "repetition_detection",
        "watermarking",
    }
)
REMOVED = {
    "best_of": "set n and choose among the outputs",
    "logits_processors": "use logit_bias, allowed_token_ids or bad_words",
    "guided_decoding": "structured output is not supported yet",
    "truncate_prompt_tokens": "shorten the prompt before the call",
    "use_beam_search": "set n and choose among the outputs",
}


class RequestOutputKind(enum.IntEnum):
    """What each :class:`~graphserve.outputs.RequestOutput` of a request carries."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last output
    FINAL_ONLY = 2  # one output, when the request has ended


class _RefusesUnknownNames(msgspec.StructMeta):
    """Replaces msgspec's TypeError for an unknown keyword by an error that says what is allowed."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        fields = cls.__struct_fields__
        for name, value in kwargs.items():
            if name not in fields:
                raise RequestError(_unknown_name_message(name, value, fields), param=name)
        return super().__call__(*args, **kwargs)


def _unknown_name_message(name: str, value: object, fields: Iterable[str]) -> str:
    if name in REMOVED:
        return f"sampling parameter {name}={value!r} does not exist: {REMOVED[name]}"
    if name in NOT_SUPPORTED:
        return f"sampling parameter {name}={value!r} is not supported by graphserve yet: leave it out"
    close = difflib.get_close_matches(name, list(fields), n=1)
    hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(fields)}"
    return f"unknown sampling parameter {name}={value!r}: {hint}"


class SamplingParams(msgspec.Struct, metaclass=_RefusesUnknownNames, kw_only=True, forbid_unknown_fields=True):
    """How one request is sampled, when it stops and what its outputs carry.

    Invariant: an existing object is valid in itself; what depends on the model (vocabulary, ``max_logprobs``,
    ``max_model_len``) is checked by the engine when the request is added.

    Attributes:
        n: number of completions, 1..16384; must be 1 when greedy.
        presence_penalty: [-2, 2], subtracted once from every token id that has been generated.
        frequency_penalty: [-2, 2], subtracted once per occurrence among the generated tokens.
        repetition_penalty: > 0; logits of ids seen in prompt or output are divided by it (multiplied if negative).
        temperature: 0..2; below 1e-5 the choice is greedy; values in between and 0.01 are raised to 0.01.
        top_p: (0, 1]; the smallest set of most likely tokens with this mass is kept.
        top_k: 0 or -1 keeps all, otherwise the k most likely (ties with the k-th are kept).
        min_p: [0, 1]; tokens less likely than ``min_p`` times the most likely one are dropped.
        seed: int64; None or -1 lets the engine draw one. Equal seed, equal logits: equal tokens, in any batch.
        stop: strings that end the text; the text stops before the string (see ``include_stop_str_in_output``).
        stop_token_ids: ids that end the output besides the model's end-of-sequence ids.
        ignore_eos: the model's end-of-sequence ids do not end the output.
        max_tokens: number of tokens to generate, None for as many as ``max_model_len`` allows.
        min_tokens: end-of-sequence ids, stop ids and stop strings cannot end the output before this many tokens.
        logprobs: number of most likely tokens reported at each position besides the sampled one; -1 for all.
            Values are those of the model's raw distribution, before penalties and temperature.
        prompt_logprobs: the same for the positions of the prompt.
        detokenize: False leaves ``text`` empty.
        skip_special_tokens: special tokens leave no text.
        spaces_between_special_tokens: whether neighbouring special tokens are separated by a space in the text.
        output_kind: see :class:`RequestOutputKind`.
        logit_bias: token id → value added to its logit, clamped to [-100, 100].
        allowed_token_ids: if given, only these ids can be sampled (1..1024 ids).
        bad_words: words whose completion is suppressed (at most 128).

    Raises:
        RequestError: a name or value is not allowed; the message says which, and what is.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_stops()
        self._check_token_lists()
        if self.is_greedy:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
            if self.n != 1:
                raise RequestError(
                    f"n={self.n} with temperature={self.temperature}: greedy decoding gives {self.n} times the same "
                    "answer; set n=1 or raise temperature",
                    param="n",
                )
        elif self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %g is raised to %g, the smallest that can be computed", self.temperature, 0.01)
            self.temperature = MIN_TEMPERATURE

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields replaced, checked anew."""
        copy: SamplingParams = msgspec.structs.replace(self, **changes)
        return copy

    def _check_numbers(self) -> None:
        _require_int("n", self.n, 1, MAX_N)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _require_number("temperature", self.temperature, 0.0, 2.0)
        _require_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_int("top_k", self.top_k, -1, INT64_MAX)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _require_int("seed", self.seed, INT64_MIN, INT64_MAX)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, INT64_MAX)
        _require_int("min_tokens", self.min_tokens, 0, INT64_MAX if self.max_tokens is None else self.max_tokens)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, -1, INT64_MAX)
        if self.prompt_logprobs is not None:
            _require_int("prompt_logprobs", self.prompt_logprobs, -1, INT64_MAX)
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            if not isinstance(getattr(self, name), bool):
                raise _refused(name, getattr(self, name), "True or False")
        try:
            self.output_kind = RequestOutputKind(self.output_kind)
        except ValueError:
            raise _refused("output_kind", self.output_kind, "a RequestOutputKind") from None
        self.top_k = max(self.top_k, 0)
        if self.seed == -1:
            self.seed = None

    def _check_stops(self) -> None:
        if self.stop is not None and not isinstance(self.stop, str):
            if not isinstance(self.stop, (list, tuple)) or not all(isinstance(s, str) for s in self.stop):
                raise _refused("stop", self.stop, "a string or a list of strings")
            self.stop = list(self.stop)
        if any(not s for s in self.stop_strings):
            raise _refused("stop", self.stop, "strings that are not empty")
        if self.stop_strings and not self.detokenize:
            raise RequestError(
                f"stop={self.stop!r} needs the text of the output: set detokenize=True or use stop_token_ids",
                param="stop",
            )

    def _check_token_lists(self) -> None:
        self.stop_token_ids = _token_id_list("stop_token_ids", self.stop_token_ids)
        self.allowed_token_ids = _token_id_list("allowed_token_ids", self.allowed_token_ids)
        if self.allowed_token_ids is not None and not 1 <= len(self.allowed_token_ids) <= MAX_ALLOWED_TOKEN_IDS:
            raise RequestError(
                f"allowed_token_ids has {len(self.allowed_token_ids)} ids, allowed are 1 to {MAX_ALLOWED_TOKEN_IDS}",
                param="allowed_token_ids",
            )
        if self.logit_bias is not None:
            self.logit_bias = _logit_bias(self.logit_bias)
        if self.bad_words is not None:
            words = self.bad_words
            if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) and w for w in words):
                raise _refused("bad_words", words, "a list of strings that are not empty")
            if len(words) > MAX_BAD_WORDS:
                raise _refused("bad_words", words, f"a list of at most {MAX_BAD_WORDS} words, it has {len(words)}")
            self.bad_words = list(words)


def _refused(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"{name}={value!r} is not allowed: it must be {allowed}", param=name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_int(name: str, value: object, low: int, high: int) -> None:
    allowed = f"an integer in [{low}, {high}]" if low == INT64_MIN or high < INT64_MAX else f"an integer >= {low}"
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _refused(name, value, allowed)


def _require_number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    allowed = f"a finite number {'>' if open_low else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):  # type: ignore[arg-type]
        raise _refused(name, value, allowed)
    if value < low or value > high or (open_low and value == low):  # type: ignore[operator]
        raise _refused(name, value, allowed)


def _token_id_list(name: str, ids: object) -> list[int] | None:
    if ids is None:
        return None
    if not isinstance(ids, (list, tuple)) or not all(_is_int(i) and i >= 0 for i in ids):
        raise _refused(name, ids, "a list of token ids >= 0")
    return list(ids)


def _logit_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, dict):
        raise _refused("logit_bias", bias, "a mapping from token id to a number")
    checked: dict[int, float] = {}
    for token_id, value in bias.items():
        try:
            key = int(token_id)  # JSON objects have string keys
        except (TypeError, ValueError):
            raise _refused("logit_bias", token_id, "a mapping from token id to a number") from None
        if key < 0:
            raise _refused("logit_bias", token_id, "a mapping from token ids >= 0 to numbers")
        _require_number("logit_bias", value, -math.inf, math.inf)
        checked[key] = max(-LOGIT_BIAS_LIMIT, min(LOGIT_BIAS_LIMIT, float(value)))
    return checked
