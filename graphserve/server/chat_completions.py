"""``POST /v1/chat/completions``."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from aiohttp import web
from msgspec import UNSET

from graphserve.engine.messages import AddRequest, OutputDelta
from graphserve.server.bodies import json_response, read_body
from graphserve.server.decoding import decode_request, message_text
from graphserve.server.generation import Generation, generation
from graphserve.server.logprobs import chat_logprobs
from graphserve.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatLogprobs,
    Delta,
    Usage,
)
from graphserve.server.renderer import RenderedPrompt, Renderer
from graphserve.server.sampling import sampling_params
from graphserve.server.sse import EventStream
from graphserve.server.state import STATE


async def create_chat_completion(http_request: web.Request) -> web.StreamResponse:
    """Answer a conversation, in one answer or as a stream of events."""
    state = http_request.app[STATE]
    request = decode_request(await read_body(http_request), ChatCompletionRequest)
    renderer = state.ready_renderer()
    state.served_name(request.model)
    prompt = await _render(renderer, request)
    params = sampling_params(request, len(prompt.token_ids), state.client.info)
    response_id = f"chatcmpl-{uuid.uuid4().hex}"
    requests = [AddRequest(response_id, prompt.token_ids, params, prompt.text)]
    async with generation(state, response_id, request, requests) as running:
        if request.stream:
            return await _stream(http_request, request, running)
        return await _answer(request, running)


async def _render(renderer: Renderer, request: ChatCompletionRequest) -> RenderedPrompt:
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(request.messages):
        entry = {"role": message.role, "content": message_text(message.content, index)}
        if message.name is not None:
            entry["name"] = message.name
        messages.append(entry)
    return await renderer.render_chat(
        messages,
        add_generation_prompt=request.add_generation_prompt is not False,
        add_special_tokens=bool(request.add_special_tokens),
        template_kwargs=dict(request.chat_template_kwargs or {}),
    )


async def _answer(request: ChatCompletionRequest, running: Generation) -> web.Response:
    choices = [ChatChoice(index, AssistantMessage(""), None, None) for index in range(running.num_choices)]
    async for batch in running.deltas():
        for delta in batch:
            choice = choices[running.choice_index(delta)]
            choice.message.content += delta.text
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            if (new := _logprobs(request, delta)) is not None:
                choice.logprobs = ChatLogprobs((choice.logprobs.content if choice.logprobs else []) + new.content)
    body = ChatCompletionResponse(
        id=running.response_id, created=running.created, model=running.model, choices=choices, usage=running.usage()
    )
    return json_response(body)


async def _stream(http_request: web.Request, request: ChatCompletionRequest, running: Generation) -> web.StreamResponse:
    """A choice's chunks in OpenAI's order: role, text pieces, finish reason; then the usage, then ``[DONE]``."""
    events = EventStream(http_request)
    options = request.stream_options
    wants_usage = options is not None and bool(options.include_usage)
    is_continuous = options is not None and bool(options.continuous_usage_stats)
    begun: set[int] = set()

    def chunk(choices: list[ChatChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        shown: Any = usage if usage is not None else (None if wants_usage else UNSET)
        return ChatCompletionChunk(
            id=running.response_id, created=running.created, model=running.model, choices=choices, usage=shown
        )

    async for batch in running.deltas():
        usage = running.usage() if is_continuous else None
        parts = [part for delta in batch for part in _parts(request, running.choice_index(delta), delta, begun)]
        if parts:
            await events.send(*(chunk([part], usage) for part in parts))
    if wants_usage:
        await events.send(chunk([], running.usage()))
    await events.done()
    return events.response


def _parts(
    request: ChatCompletionRequest, index: int, delta: OutputDelta, begun: set[int]
) -> Iterator[ChatChunkChoice]:
    """The chunk parts of one delta: a role if it is the choice's first, text if there is any, the end if it ends."""
    if index not in begun:
        begun.add(index)
        yield ChatChunkChoice(index, Delta(role="assistant", content=""))
    logprobs = _logprobs(request, delta)
    if delta.text or logprobs is not None:
        yield ChatChunkChoice(index, Delta(content=delta.text), logprobs)
    if delta.finish_reason is not None:
        yield ChatChunkChoice(index, Delta(), None, delta.finish_reason, delta.stop_reason)


def _logprobs(request: ChatCompletionRequest, delta: OutputDelta) -> ChatLogprobs | None:
    if not request.logprobs or not delta.token_ids:
        return None
    return chat_logprobs(delta.token_ids, delta.logprobs or [], request.top_logprobs or 0)
