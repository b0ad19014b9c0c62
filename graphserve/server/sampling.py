"""From a request body to :class:`SamplingParams`: the client's values over the model's defaults, within limits."""

from __future__ import annotations

from typing import Any

from graphserve.engine.messages import EngineInfo
from graphserve.errors import RequestError
from graphserve.sampling_params import RequestOutputKind, SamplingParams
from graphserve.server.errors import bad_request
from graphserve.server.protocol import ChatCompletionRequest, CompletionRequest, SamplingRequest

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions

_SAME_NAME = (
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "min_p",
    "min_tokens",
    "n",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop",
    "stop_token_ids",
    "temperature",
    "top_k",
    "top_p",
)


def is_scoring_only(request: SamplingRequest) -> bool:
    """A completion with ``echo`` and ``max_tokens: 0``: the prompt's log-probabilities are wanted and no new token."""
    return isinstance(request, CompletionRequest) and bool(request.echo) and request.max_tokens == 0


def sampling_params(request: SamplingRequest, prompt_len: int, info: EngineInfo) -> SamplingParams:
    """The parameters of one engine request.

    Raises:
        ApiError: 400 naming the field.
    """
    values: dict[str, Any] = dict(info.default_sampling_params)
    for name in _SAME_NAME:
        if (value := getattr(request, name)) is not None:
            values[name] = value
    values["logprobs"], values["prompt_logprobs"] = _logprobs(request, info.max_logprobs)
    values["max_tokens"] = _max_tokens(request, prompt_len, info, values.pop("max_tokens", None))
    values["output_kind"] = RequestOutputKind.DELTA
    try:
        return SamplingParams(**values)
    except RequestError as error:
        raise bad_request(str(error), error.param) from None


def _max_tokens(request: SamplingRequest, prompt_len: int, info: EngineInfo, default: int | None) -> int:
    room = info.max_model_len - prompt_len
    if room < 1:
        raise bad_request(
            f"the prompt has {prompt_len} tokens, max_model_len is {info.max_model_len} and one is needed for the "
            "answer: shorten the prompt or serve with a larger --max-model-len",
            "messages" if isinstance(request, ChatCompletionRequest) else "prompt",
            "context_length_exceeded",
        )
    field, wanted = "max_tokens", request.max_tokens
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        field, wanted = "max_completion_tokens", request.max_completion_tokens
    if is_scoring_only(request):
        return 1
    if wanted is None:
        if default is None and isinstance(request, CompletionRequest):
            default = DEFAULT_COMPLETION_TOKENS
        return min(room, default or room)
    if wanted < 1:
        raise bad_request(f"{field} is {wanted}, it must be at least 1", field)
    if wanted > room:
        raise bad_request(
            f"{prompt_len} prompt tokens and {field}={wanted} exceed max_model_len={info.max_model_len}: ask for at "
            f"most {room} or shorten the prompt",
            field,
            "context_length_exceeded",
        )
    return wanted


def _logprobs(request: SamplingRequest, max_logprobs: int) -> tuple[int | None, int | None]:
    """Numbers of candidates for generated and for prompt tokens."""
    if isinstance(request, ChatCompletionRequest):
        wanted = (request.top_logprobs or 0) if request.logprobs else None
        field = "top_logprobs"
        is_echoed = False
    else:
        assert isinstance(request, CompletionRequest)
        wanted, field, is_echoed = request.logprobs, "logprobs", bool(request.echo)
    if wanted is not None and (wanted < 0 or wanted > max_logprobs >= 0):
        allowed = f"0 to {max_logprobs}" if max_logprobs >= 0 else "0 or more"
        raise bad_request(f"{field} is {wanted}, allowed is {allowed}", field)
    return wanted, wanted if is_echoed else None
