"""What a request gives back. Plain msgspec structs, so that they cross a process boundary as they are."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class Logprob(msgspec.Struct):
    """Log-probability of one token at one position.

    Attributes:
        logprob: natural logarithm, of the model's raw distribution.
        rank: 1 for the most likely token.
        decoded_token: the token's text, None if the engine has no tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# One position: the sampled (or given) token first, then the most likely ones by rank.
PositionLogprobs = dict[int, Logprob]


class CompletionOutput(msgspec.Struct):
    """One of the ``n`` completions of a request; ``finish_reason`` is None while it runs.

    Attributes:
        stop_reason: the stop string or stop token id that ended it, None for an end-of-sequence id.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct):
    """Times of one request in seconds of the monotonic clock; None until reached."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


class RequestOutput(msgspec.Struct):
    """The state of a request (or what is new in it, see ``SamplingParams.output_kind``).

    Attributes:
        prompt_logprobs: one entry per prompt position, the first None; None if not asked for.
        error: why the request failed, when a completion's ``finish_reason`` is "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: str | None = None
