"""``POST /v1/completions``."""

from __future__ import annotations

import uuid
from typing import Any

from aiohttp import web
from msgspec import UNSET

from graphserve.engine.messages import AddRequest, OutputDelta
from graphserve.server.bodies import json_response, read_body
from graphserve.server.decoding import completion_prompts, decode_request
from graphserve.server.generation import Generation, generation
from graphserve.server.logprobs import completion_logprobs
from graphserve.server.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
    Usage,
)
from graphserve.server.renderer import RenderedPrompt
from graphserve.server.sampling import is_scoring_only, sampling_params
from graphserve.server.sse import EventStream
from graphserve.server.state import STATE, ServerState


async def create_completion(http_request: web.Request) -> web.StreamResponse:
    """Complete one or several prompts, in one answer or as a stream of events."""
    state = http_request.app[STATE]
    request = decode_request(await read_body(http_request), CompletionRequest)
    renderer = state.ready_renderer()
    state.served_name(request.model)
    prompts = completion_prompts(request)
    rendered = await renderer.tokenize(prompts, request.add_special_tokens is not False, bool(request.echo))
    response_id = f"cmpl-{uuid.uuid4().hex}"
    requests = _engine_requests(state, request, rendered, response_id)
    async with generation(state, response_id, request, requests) as running:
        pieces = _Pieces(request, running)
        if request.stream:
            return await _stream(http_request, request, running, pieces)
        return await _answer(running, pieces)


def _engine_requests(
    state: ServerState, request: CompletionRequest, rendered: list[RenderedPrompt], response_id: str
) -> list[AddRequest]:
    return [
        AddRequest(
            f"{response_id}-{index}",
            prompt.token_ids,
            sampling_params(request, len(prompt.token_ids), state.client.info),
            prompt.text,
        )
        for index, prompt in enumerate(rendered)
    ]


async def _answer(running: Generation, pieces: _Pieces) -> web.Response:
    choices = [CompletionChoice(index, "") for index in range(running.num_choices)]
    async for batch in running.deltas():
        for delta in batch:
            piece = pieces.take(delta)
            choice = choices[piece.index]
            choice.text += piece.text
            choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
            if piece.logprobs is not None:
                choice.logprobs = _joined(choice.logprobs, piece.logprobs)
    body = CompletionResponse(
        id=running.response_id, created=running.created, model=running.model, choices=choices, usage=pieces.usage()
    )
    return json_response(body)


async def _stream(
    http_request: web.Request,
    request: CompletionRequest,
    running: Generation,
    pieces: _Pieces,
) -> web.StreamResponse:
    """Text pieces, then one chunk with the finish reason a choice, then the usage if wanted, then ``[DONE]``."""
    events = EventStream(http_request)
    options = request.stream_options
    wants_usage = options is not None and bool(options.include_usage)
    is_continuous = options is not None and bool(options.continuous_usage_stats)

    def chunk(choices: list[CompletionChoice], usage: Usage | None) -> CompletionResponse:
        shown: Any = usage if usage is not None else (None if wants_usage else UNSET)
        return CompletionResponse(
            id=running.response_id, created=running.created, model=running.model, choices=choices, usage=shown
        )

    async for batch in running.deltas():
        payloads = []
        for delta in batch:
            piece = pieces.take(delta)
            usage = pieces.usage() if is_continuous else None
            reason, stop_reason = piece.finish_reason, piece.stop_reason
            if piece.text or piece.logprobs is not None:
                piece.finish_reason = piece.stop_reason = None
                payloads.append(chunk([piece], usage))
            if reason is not None:
                last = CompletionChoice(piece.index, "", None, reason, stop_reason)
                payloads.append(chunk([last], usage))
        if payloads:
            await events.send(*payloads)
    if wants_usage:
        await events.send(chunk([], pieces.usage()))
    await events.done()
    return events.response


class _Pieces:
    """Turns deltas into choices' pieces: adds the echoed prompt to a choice's first one, keeps text offsets."""

    def __init__(self, request: CompletionRequest, running: Generation) -> None:
        self._running = running
        self._num_top = request.logprobs
        self._is_echoed = bool(request.echo)
        self._is_scoring_only = is_scoring_only(request)
        self._text_len = [0] * running.num_choices
        self._is_begun = [False] * running.num_choices
        self._prompt_logprobs: dict[str, CompletionLogprobs] = {}

    def take(self, delta: OutputDelta) -> CompletionChoice:
        index = self._running.choice_index(delta)
        piece = CompletionChoice(index, "", None, delta.finish_reason, delta.stop_reason)
        if self._is_echoed and not self._is_begun[index]:
            self._begin_echo(piece, delta)
        self._is_begun[index] = True
        if self._is_scoring_only:
            # the one token that was generated to run the prompt through the model is not part of the answer
            piece.finish_reason = "length" if delta.finish_reason is not None else None
            piece.stop_reason = None
            return piece
        if self._num_top is not None and delta.token_ids:
            offset = self._text_len[index] + len(piece.text)
            new = completion_logprobs(delta.token_ids, delta.logprobs or [], self._num_top, offset)
            piece.logprobs = _joined(piece.logprobs, new)
        piece.text += delta.text
        self._text_len[index] += len(piece.text)
        return piece

    def usage(self) -> Usage:
        usage = self._running.usage()
        if self._is_scoring_only:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _begin_echo(self, piece: CompletionChoice, delta: OutputDelta) -> None:
        prompt = self._running.prompt_of(piece.index)
        piece.text = prompt.prompt or ""
        if self._num_top is not None:
            if delta.prompt_logprobs is not None:  # comes once a request, and serves all its choices
                self._prompt_logprobs[delta.request_id] = completion_logprobs(
                    prompt.prompt_token_ids, delta.prompt_logprobs, self._num_top, 0
                )
            piece.logprobs = self._prompt_logprobs.get(delta.request_id)


def _joined(first: CompletionLogprobs | None, second: CompletionLogprobs) -> CompletionLogprobs:
    """The entries of both, in a new object."""
    if first is None:
        return second
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        None if first.top_logprobs is None else first.top_logprobs + (second.top_logprobs or []),
        first.text_offset + second.text_offset,
    )
