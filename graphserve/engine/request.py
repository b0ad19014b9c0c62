"""One request as the engine core sees it, and the messages in which it enters and leaves."""

from __future__ import annotations

import enum
from array import array

import msgspec

from graphserve.outputs import FinishReason
from graphserve.runtime.step_input import TokenLogprobs
from graphserve.sampling_params import SamplingParams


class EngineCoreRequest(msgspec.Struct):
    """A validated request for one completion (``params.n`` has been fanned out).

    Attributes:
        max_tokens: tokens to generate at most, already limited by ``max_model_len``.
        seed: 64-bit seed, always set.
        eos_token_ids: the model's end-of-sequence ids, empty with ``ignore_eos``.
        bad_words_token_ids: token sequences whose last token is suppressed after the others.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    eos_token_ids: list[int]
    bad_words_token_ids: list[list[int]] = []


class EngineCoreOutput(msgspec.Struct):
    """What one step added to one request.

    Attributes:
        new_token_ids: at most one token now; a list, because a step may once accept several.
        logprobs: one entry per new token, None if not asked for.
        prompt_logprobs: entries for the next prompt positions (the first covers position 1), None if none are new.
        error: why the request failed, with ``finish_reason`` "error".
    """

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_preemptions: int = 0


class RequestStatus(enum.IntEnum):
    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED = 3


class Request:
    """Mutable state of a request between arrival and its last token.

    Its tokens are ``token_ids`` (prompt, then output) and, behind them, ``num_placeholders`` tokens that submitted
    steps sample and nobody here knows yet. A step computes the next tokens up to the last one; only when it reaches
    that does it sample. Prefill, chunked prefill, decode and recompute after a preemption are this one rule.

    Invariant: ``num_computed_tokens <= num_scheduled_tokens <= num_tokens``. The KV of the first
    ``num_computed_tokens`` is in the cache, as far as later queries can see it; that of the others up to
    ``num_scheduled_tokens`` is written by the ``num_steps_in_flight`` steps that were submitted and have not retired.
    """

    __slots__ = (
        "arrival",
        "block_tables",
        "core_request",
        "lane",
        "num_computed_tokens",
        "num_known_prompt_logprobs",
        "num_placeholders",
        "num_preemptions",
        "num_prompt_tokens",
        "num_retired_blocks",
        "num_scheduled_tokens",
        "num_steps_in_flight",
        "params",
        "reads_output",
        "request_id",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, core_request: EngineCoreRequest, arrival: int) -> None:
        self.core_request = core_request
        self.request_id = core_request.request_id
        self.params = core_request.params
        self.arrival = arrival
        self.token_ids = array("q", core_request.prompt_token_ids)
        self.num_prompt_tokens = len(core_request.prompt_token_ids)
        self.stop_token_ids = frozenset(core_request.params.stop_token_ids or ())
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.num_placeholders = 0
        self.num_steps_in_flight = 0
        # Whether sampling looks at the tokens before: penalties count them, and a bad word goes on from them.
        self.reads_output = self.params.has_penalties or any(len(word) > 1 for word in core_request.bad_words_token_ids)
        self.num_known_prompt_logprobs = 0  # prompt positions 1.. whose log-probabilities were already reported
        self.num_preemptions = 0
        self.status = RequestStatus.WAITING
        self.lane: int | None = None  # owned from the first step on, see StepInput
        # Owned by the KV cache manager: one table a cache group, and how many leading entries of it are null.
        self.block_tables: list[array[int]] = []
        self.num_retired_blocks: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Known tokens and placeholders."""
        return len(self.token_ids) + self.num_placeholders

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens, without placeholders."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens_to_compute(self) -> int:
        if self.num_placeholders and self.num_tokens - self.num_prompt_tokens >= self.core_request.max_tokens:
            return 0  # the last token is on its way
        return self.num_tokens - self.num_scheduled_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the next step computes only the token sampled last."""
        return self.num_tokens_to_compute == 1 and self.num_tokens > self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions are left whose log-probabilities are asked for and not yet known."""
        return self.params.prompt_logprobs is not None and self.num_known_prompt_logprobs < self.num_prompt_tokens - 1

    def stop_cause(self, token_id: int) -> tuple[FinishReason, int | None] | None:
        """``(finish_reason, stop_reason)`` if the output ends with ``token_id``, its last token, else None."""
        num_output_tokens = self.num_output_tokens
        if num_output_tokens >= self.params.min_tokens:
            if token_id in self.core_request.eos_token_ids:
                return "stop", None
            if token_id in self.stop_token_ids:
                return "stop", token_id
        if num_output_tokens >= self.core_request.max_tokens:
            return "length", None
        return None
