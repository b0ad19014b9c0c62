"""Request and response types of the OpenAI endpoints, and the strict decoding of request bodies.

Every field of a body is one of: known and typed (a struct field below), known but not supported (refused by name unless
it has the value that changes nothing), or unknown (refused by name). Ranges of sampling values are checked where they
are defined, in :class:`graphserve.sampling_params.SamplingParams`; sizes that only a server must bound are checked here.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from graphserve.server.errors import bad_request

MAX_CHOICES = 128  # OpenAI's own limit for ``n``
MAX_PROMPTS = 1024
MAX_SEQUENCES = 1024  # prompts times n of one request
MAX_MESSAGES = 4096
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024

# Field → values that ask for nothing. Anything else is refused with the field's name.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "cache_salt": (None,),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "ec_transfer_params": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "include_reasoning": (None, True),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1.0),
    "logprob_token_ids": (None,),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "priority": (None, 0),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None, "none"),
    "repetition_detection": (None,),
    "request_id": (None,),
    "response_format": (None, {"type": "text"}),
    "return_prompt_text": (None, False),
    "return_token_ids": (None, False),
    "return_token_offsets": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "service_tier": (None, "auto", "default"),
    "session_id": (None,),
    "store": (None, False),
    "stream_interval": (None, 1),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "thinking_token_budget": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None,),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "vllm_xargs": (None, {}),
    "watermarking": (None, False),
    "web_search_options": (None,),
}

# The same for the fields of one chat message; clients send answers back with these keys at their empty values.
UNSUPPORTED_MESSAGE_FIELDS: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "reasoning": (None, ""),
    "reasoning_content": (None, ""),
    "refusal": (None,),
    "tool_call_id": (None,),
    "tool_calls": (None, []),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """``include_usage``: a last chunk with the usage. ``continuous_usage_stats``: usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that both endpoints share. None means: the model's default."""

    model: str | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    add_special_tokens: bool | None = None
    # Identifiers and hints that do not bear on the answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None


class CompletionRequest(SamplingRequest, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/completions``. ``prompt``: a text, texts, token ids, or lists of token ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message; ``content`` is a text or a list of ``{"type": "text", "text": ...}`` parts."""

    role: str
    content: str | list[Any] | None = None
    name: str | None = None


class ChatCompletionRequest(SamplingRequest, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    echo: Literal[False] | None = None


class PromptTokensDetails(msgspec.Struct):
    """``cached_tokens``: prompt tokens whose KV came from the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Token counts of one response."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion, one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One text of a completion, or one piece of it in a stream. ``stop_reason``: the stop string or id that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class CompletionResponse(msgspec.Struct, kw_only=True):
    """Answer of ``/v1/completions`` and, with pieces as choices, each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """One candidate token; ``bytes`` is its UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """The chosen token and its best competitors."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a chat choice."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(msgspec.Struct):
    """The answer of one choice."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    """One answer of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class ChatCompletionResponse(msgspec.Struct, kw_only=True):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct):
    """What a chunk adds: the role (first chunk), text, or nothing (the chunk with the finish reason)."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """One choice's part of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None | UnsetType = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """One entry of ``GET /v1/models``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "graphserve"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


RequestT = TypeVar("RequestT", bound=SamplingRequest)


def decode_request(body: bytes, kind: type[RequestT]) -> RequestT:
    """Parse and check one request body.

    Raises:
        ApiError: 400 with the offending field in ``param``.
    """
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"the request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise bad_request("the request body must be a JSON object", code="invalid_json")
    _drop_unsupported(data, UNSUPPORTED_FIELDS, kind.__struct_fields__, "")
    messages = data.get("messages")
    if kind is ChatCompletionRequest and isinstance(messages, list):
        for index, message in enumerate(messages):
            if isinstance(message, dict):
                path = f"messages[{index}]."
                _drop_unsupported(message, UNSUPPORTED_MESSAGE_FIELDS, ChatMessage.__struct_fields__, path)
    try:
        request = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message, param = _readable(str(error))
        raise bad_request(message, param) from None
    _check_sizes(request)
    return request


def _drop_unsupported(
    data: dict[str, Any], unsupported: dict[str, tuple[Any, ...]], known: tuple[str, ...], path: str
) -> None:
    for name in [name for name in data if name not in known]:
        if name not in unsupported:
            raise bad_request(f"unknown field {path}{name!s:.64}", f"{path}{name!s:.64}", "unknown_field")
        if not any(_same(data[name], neutral) for neutral in unsupported[name]):
            raise bad_request(f"{path}{name} is not supported by this server", path + name, "unsupported_field")
        del data[name]


def _same(value: Any, neutral: Any) -> bool:
    # bool is an int in Python: without the type check ``best_of: true`` would pass for 1
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


_PATH = re.compile(r" - at `\$\.?(?P<path>.*)`$")
_MISSING = re.compile(r"Object missing required field `(?P<name>\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*?)`")


def _readable(text: str) -> tuple[str, str | None]:
    """msgspec's sentence → (our sentence, field)."""
    found = _PATH.search(text)
    path = found["path"] if found else ""
    problem = text[: found.start()] if found else text
    for pattern, words in ((_MISSING, "is required"), (_UNKNOWN, "is not a known field")):
        if match := pattern.match(problem):
            path = f"{path}.{match['name']}".lstrip(".")
            return f"{path} {words}", path
    problem = problem[:1].lower() + problem[1:].replace("`", "")
    return (f"{path}: {problem}", path) if path else (problem, None)


def _check_sizes(request: SamplingRequest) -> None:
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_CHOICES:
        raise bad_request(f"n is {n}, allowed is 1 to {MAX_CHOICES}", "n")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOP_STRINGS or any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise bad_request(f"stop takes at most {MAX_STOP_STRINGS} strings of {MAX_STOP_CHARS} characters", "stop")
    if len(request.logit_bias or ()) > MAX_LOGIT_BIAS:
        raise bad_request(f"logit_bias has {len(request.logit_bias or ())} entries, at most {MAX_LOGIT_BIAS} are allowed",
                          "logit_bias")  # fmt: skip
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is only allowed with stream: true", "stream_options")
    if isinstance(request, ChatCompletionRequest):
        if not 1 <= len(request.messages) <= MAX_MESSAGES:
            raise bad_request(f"messages has {len(request.messages)} entries, allowed is 1 to {MAX_MESSAGES}", "messages")
        if request.top_logprobs is not None and not request.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")


def completion_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a completion request, each a text or token ids.

    Raises:
        ApiError: 400 for a mixture, an empty list, or too many sequences.
    """
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    prompts: list[str | list[int]]
    if prompt and all(isinstance(item, int) for item in prompt):
        prompts = [prompt]  # type: ignore[list-item]
    elif all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
        prompts = prompt  # type: ignore[assignment]
    else:
        raise bad_request("prompt mixes texts and token ids: send texts, token ids, or lists of token ids", "prompt")
    n = request.n or 1
    if not prompts or len(prompts) > MAX_PROMPTS:
        raise bad_request(f"prompt has {len(prompts)} entries, allowed is 1 to {MAX_PROMPTS}", "prompt")
    if len(prompts) * n > MAX_SEQUENCES:
        raise bad_request(f"{len(prompts)} prompts times n={n} exceed {MAX_SEQUENCES} sequences", "n")
    return prompts


def message_text(content: str | list[Any] | None, index: int) -> str:
    """The text of one message; a list of text parts is joined by newlines, as chat templates expect one string.

    Raises:
        ApiError: 400 for a part that is not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        path = f"messages[{index}].content[{number}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise bad_request(f"{path} must be an object with a type", path)
        if part["type"] != "text":
            raise bad_request(f"{path}: parts of type {part['type']!s:.32} are not supported, only text", path)
        if unknown := sorted(part.keys() - {"type", "text"}):
            raise bad_request(f"unknown field {path}.{unknown[0]:.64}", f"{path}.{unknown[0]:.64}", "unknown_field")
        if not isinstance(part.get("text"), str):
            raise bad_request(f"{path}.text must be a string", f"{path}.text")
        texts.append(part["text"])
    return "\n".join(texts)
