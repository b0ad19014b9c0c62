"""One HTTP request's generation: admission, submission, metrics, and the abort that always follows an early end."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from graphserve.engine.messages import AddRequest, OutputDelta
from graphserve.engine.request_stream import RequestFailedError
from graphserve.errors import EngineDeadError, RequestError
from graphserve.server.errors import ApiError, bad_request, engine_dead
from graphserve.server.protocol import PromptTokensDetails, SamplingRequest, Usage
from graphserve.server.state import ServerState

logger = logging.getLogger(__name__)


class Generation:
    """The running engine requests of one HTTP request, seen as numbered choices.

    Prompt ``p`` with ``n`` choices gives choices ``p*n`` to ``p*n + n-1``, OpenAI's numbering.
    """

    def __init__(self, state: ServerState, response_id: str, model: str, requests: list[AddRequest]) -> None:
        self._state = state
        self._requests = requests
        self._prompt_of = {request.request_id: index for index, request in enumerate(requests)}
        self._n = requests[0].params.n
        self._timers = {
            request.request_id: state.metrics.request(
                model, len(request.prompt_token_ids), request.params.max_tokens or 0, self._n
            )
            for request in requests
        }
        self._begin = time.monotonic()
        self._num_running = self.num_choices
        self.response_id, self.model, self.created = response_id, model, int(time.time())
        self.num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.num_completion_tokens = 0
        self._num_cached: dict[str, int] = {}
        self._stream = state.client.submit(requests)

    @property
    def num_choices(self) -> int:
        return len(self._requests) * self._n

    def choice_index(self, delta: OutputDelta) -> int:
        """The number of the choice that a delta belongs to."""
        return self._prompt_of[delta.request_id] * self._n + delta.index

    def prompt_of(self, choice: int) -> AddRequest:
        """The engine request behind a choice."""
        return self._requests[choice // self._n]

    async def deltas(self) -> AsyncIterator[list[OutputDelta]]:
        """Batches of deltas until every choice has finished.

        Raises:
            ApiError: the request is invalid (400), or the engine failed (500).
        """
        try:
            async for batch in self._stream:
                for delta in batch:
                    self._note(delta)
                yield batch
        except RequestError as error:
            raise bad_request(str(error), error.param) from None
        except RequestFailedError as error:
            logger.error("request %s failed in the engine: %s", self.response_id, error)
            raise ApiError(500, "the engine failed on this request", code="request_failed") from None
        except EngineDeadError:
            raise engine_dead() from None

    def usage(self) -> Usage:
        """Token counts so far."""
        total = self.num_prompt_tokens + self.num_completion_tokens
        details = PromptTokensDetails(sum(self._num_cached.values()))
        return Usage(self.num_prompt_tokens, self.num_completion_tokens, total, details)

    def close(self) -> None:
        """End what still runs, and log the request's one line."""
        self._state.client.abort(self._stream)
        if self._num_running:
            for timer in self._timers.values():
                timer.aborted()
        logger.info(
            "%s: %d prompt tokens, %d generated, %d of %d choices finished, %.2f s",
            self.response_id,
            self.num_prompt_tokens,
            self.num_completion_tokens,
            self.num_choices - self._num_running,
            self.num_choices,
            time.monotonic() - self._begin,
        )

    def _note(self, delta: OutputDelta) -> None:
        self.num_completion_tokens += len(delta.token_ids)
        self._num_cached[delta.request_id] = delta.num_cached_tokens
        self._timers[delta.request_id].record(delta)
        if delta.finish_reason is not None:
            self._num_running -= 1


@asynccontextmanager
async def generation(
    state: ServerState, response_id: str, request: SamplingRequest, requests: list[AddRequest]
) -> AsyncIterator[Generation]:
    """Admit and submit ``requests``; whatever ends the body, nothing of them is left in the engine afterwards.

    Raises:
        ApiError: 429 or 503 when they are not admitted.
    """
    model = state.served_name(request.model)
    with state.admit(len(requests) * requests[0].params.n):
        try:
            running = Generation(state, response_id, model, requests)
        except EngineDeadError:
            raise engine_dead() from None
        try:
            yield running
        finally:
            running.close()
