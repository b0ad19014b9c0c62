"""Strict decoding of request bodies.

Every field of a body is one of: known and typed (``protocol.py``), known but not supported (refused by name unless it
has the value that changes nothing), or unknown (refused by name). Ranges of sampling values are checked where they are
defined, in :class:`graphserve.sampling_params.SamplingParams`; sizes that only a server must bound are checked here.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from graphserve.server.errors import bad_request
from graphserve.server.protocol import ChatCompletionRequest, ChatMessage, CompletionRequest, SamplingRequest

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
    if (num_biases := len(request.logit_bias or ())) > MAX_LOGIT_BIAS:
        raise bad_request(f"logit_bias has {num_biases} entries, at most {MAX_LOGIT_BIAS} are allowed", "logit_bias")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is only allowed with stream: true", "stream_options")
    if isinstance(request, ChatCompletionRequest):
        if not 1 <= (num_messages := len(request.messages)) <= MAX_MESSAGES:
            raise bad_request(f"messages has {num_messages} entries, allowed is 1 to {MAX_MESSAGES}", "messages")
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
