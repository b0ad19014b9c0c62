"""Engine log-probabilities in the shapes of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Sequence

from graphserve.outputs import Logprob, PositionLogprobs
from graphserve.server.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

_FLOOR = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _FLOOR)


def _text(token_id: int, entry: Logprob) -> str:
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


def _best(position: PositionLogprobs, num_top: int) -> list[tuple[int, Logprob]]:
    """The ``num_top`` most likely tokens; the sampled one is the first entry and may rank anywhere."""
    return sorted(position.items(), key=lambda item: -item[1].logprob)[:num_top]


def completion_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None], num_top: int, text_offset: int
) -> CompletionLogprobs:
    """Lists over the tokens, from ``text_offset`` on. A position of None: nothing predicts that token."""
    result = CompletionLogprobs([], [], [] if num_top else None, [])
    for token_id, position in zip(token_ids, positions, strict=True):
        entry = position.get(token_id) if position else None
        token = _text(token_id, entry) if entry else ""
        result.tokens.append(token)
        result.token_logprobs.append(_value(entry) if entry else None)
        result.text_offset.append(text_offset)
        text_offset += len(token)
        if result.top_logprobs is not None:
            best = _best(position, num_top) if position else []
            top = {_text(i, candidate): _value(candidate) for i, candidate in best}
            result.top_logprobs.append(top or None)
    return result


def chat_logprobs(token_ids: Sequence[int], positions: Sequence[PositionLogprobs], num_top: int) -> ChatLogprobs:
    """One entry a token, with its ``num_top`` best candidates."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        entry = position[token_id]
        token = _text(token_id, entry)
        top = [
            TopLogprob(text, _value(candidate), list(text.encode()))
            for text, candidate in ((_text(i, candidate), candidate) for i, candidate in _best(position, num_top))
        ]
        content.append(TokenLogprob(token, _value(entry), list(token.encode()), top))
    return ChatLogprobs(content)
