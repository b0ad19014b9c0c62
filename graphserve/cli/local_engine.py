"""An engine in the process of the command, with phases on stderr and text as it comes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from types import TracebackType
from typing import Any

from graphserve import progress
from graphserve.config import EngineConfig
from graphserve.engine.llm_engine import LLMEngine
from graphserve.engine.served_engine import changed_fields
from graphserve.errors import GraphserveError
from graphserve.models.tokenizer import Tokenizer
from graphserve.sampling_params import RequestOutputKind, SamplingParams
from graphserve.startup import import_turn, without_collector

_MAX_HELD_WARNINGS = 1000


@contextmanager
def warnings_afterwards() -> Iterator[None]:
    """What is warned of in the body is written after it, not into the middle of a text that comes piece by piece."""
    assert logging.lastResort is not None
    held = MemoryHandler(_MAX_HELD_WARNINGS, logging.CRITICAL, logging.lastResort)
    held.setLevel(logging.WARNING)
    logger = logging.getLogger("graphserve")
    logger.addHandler(held)
    try:
        yield
    finally:
        logger.removeHandler(held)
        held.close()  # writes them


class LocalEngine:
    """A context manager: loads on entry, gives everything back on exit. Phases go to stderr if no sink is installed."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._request_numbers = itertools.count()

    def __enter__(self) -> LocalEngine:
        previous = progress.set_sink(None)
        progress.set_sink(previous or progress.StreamSink())
        try:
            with without_collector():
                with progress.phase("import torch"), import_turn():
                    # The engine needs them; here their import has a phase of its own.
                    import graphserve.engine.model_executor
                    import graphserve.runtime.load  # noqa: F401
                self._engine = LLMEngine.from_config(self._config)
        finally:
            progress.set_sink(previous)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close()

    @property
    def default_sampling_params(self) -> dict[str, Any]:
        """What the model's generation config asks for."""
        return changed_fields(self._engine.default_sampling_params())

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a conversation.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages.
        """
        return self._tokenizer.apply_chat_template(messages)

    def stream(self, prompt: str, params: SamplingParams, is_rendered: bool = False) -> Iterator[tuple[str, int]]:
        """Pieces of one completion as they are generated, each with its number of tokens.

        Leaving the loop early (also by Ctrl-C) ends the request. ``is_rendered``: the prompt comes from a chat
        template, which wrote the special tokens itself.

        Raises:
            RequestError: the prompt or a parameter is not allowed.
            GraphserveError: the engine failed on the request.
        """
        request_id = self._add(prompt, params.clone(output_kind=RequestOutputKind.DELTA), is_rendered)
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.error is not None:
                        raise GraphserveError(f"the engine failed on the prompt: {output.error}")
                    for completion in output.outputs:
                        yield completion.text, len(completion.token_ids)
        finally:
            self._engine.abort(request_id)

    def complete(
        self,
        prompts: Sequence[str],
        params: SamplingParams,
        is_rendered: bool = False,
        on_token: Callable[[], None] = lambda: None,
    ) -> list[tuple[str, int]]:
        """Whole completions, ``n`` a prompt in the order of the prompts, each with its number of tokens.

        Args:
            on_token: called after every step that gave a token.
        """
        params = params.clone(output_kind=RequestOutputKind.CUMULATIVE)
        request_ids = [self._add(prompt, params, is_rendered) for prompt in prompts]
        finished = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.error is not None:
                    raise GraphserveError(f"the engine failed on a prompt: {output.error}")
                on_token()
                finished[output.request_id] = output.outputs
        return [(completion.text, len(completion.token_ids)) for name in request_ids for completion in finished[name]]

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self._engine.tokenizer is not None, "the commands do not offer skip_tokenizer_init"
        return self._engine.tokenizer

    def _add(self, prompt: str, params: SamplingParams, is_rendered: bool) -> str:
        request_id = f"cli-{next(self._request_numbers)}"
        token_ids = self._tokenizer.encode(prompt, add_special_tokens=not is_rendered)
        self._engine.add_request(request_id, {"prompt": prompt, "prompt_token_ids": token_ids}, params)
        return request_id
