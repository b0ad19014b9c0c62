"""Chat templates: messages to prompt text, by the Jinja template that a checkpoint brings along.

A template is untrusted text. It runs in Jinja's immutable sandbox and sees plain JSON values only; what the sandbox
does not limit is CPU time and memory, so servers render off their event loop.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from graphserve.errors import RequestError

# Names under which a message may carry its reasoning; templates read the first or the second.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# Stands behind the text to be continued while the template renders, and is cut off with all that follows.
CONTINUE_MARK = "\x02continue-here\x03"


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training; here it renders as is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render messages with a template.

    Args:
        template: Jinja source, as transformers' ``apply_chat_template`` takes it.
        messages: dicts with ``role`` and ``content`` of JSON values.
        add_generation_prompt: end with the opening of an assistant turn.
        continue_final_message: leave the last message open, so that the model goes on with it.
        tools: JSON schemas of callable tools.
        documents: dicts for retrieval templates.
        variables: further names the template can read (special tokens, chat_template_kwargs).

    Raises:
        RequestError: the template refused the messages or cannot be compiled, a value is not plain JSON, or
            both ``add_generation_prompt`` and ``continue_final_message`` are set.
    """
    if continue_final_message and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt cannot both be true: set add_generation_prompt=false to "
            "continue the last message",
            param="continue_final_message",
        )
    chat = [_with_reasoning_names(_plain(message, f"messages[{i}]")) for i, message in enumerate(messages)]
    if continue_final_message:
        _mark_final_message(chat)
    try:
        text = _compile(template).render(
            messages=chat,
            tools=_plain(tools, "tools"),
            documents=_plain(documents, "documents"),
            add_generation_prompt=add_generation_prompt,
            **{key: _plain(value, f"chat_template_kwargs.{key}") for key, value in (variables or {}).items()},
        )
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"chat template is not valid Jinja (line {error.lineno}): {error.message}") from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        raise RequestError(f"chat template refused the messages: {error}", param="messages") from error
    if continue_final_message:
        head, found, _ = text.partition(CONTINUE_MARK)
        if not found:
            raise RequestError(
                "continue_final_message: the chat template dropped the last message, so it cannot be continued",
                param="continue_final_message",
            )
        return head
    return text


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


_SCALARS: tuple[Callable[..., Any], ...] = (str, bool, int, float)


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON types only: the sandbox does not know which methods of other objects are dangerous."""
    if value is None or type(value) in _SCALARS:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise RequestError(
        f"{where} is a {type(value).__name__}; allowed: str, int, float, bool, None, and lists and dicts of them",
        param=where.split("[")[0].split(".")[0],
    )


def _with_reasoning_names(message: Any) -> dict[str, Any]:
    """Fill the names that templates read reasoning from, whichever one the caller used."""
    if not isinstance(message, dict):
        raise RequestError(f"each message must be an object with role and content, found {message!r:.80}", "messages")
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_final_message(chat: list[dict[str, Any]]) -> None:
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        # Templates may trim the content; the mark must follow the text directly.
        chat[-1]["content"] = content + CONTINUE_MARK
        return
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += CONTINUE_MARK
            return
    raise RequestError(
        "continue_final_message: the last message has no text content to continue", param="continue_final_message"
    )
