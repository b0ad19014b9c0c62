"""From what the engine core computed to what callers see: text, log-probabilities, stop strings, joined completions."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from graphserve.engine.detokenizer import Detokenizer, TokenTexts
from graphserve.engine.input_processor import ProcessedInput
from graphserve.engine.request import EngineCoreOutput, EngineCoreRequest
from graphserve.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from graphserve.runtime.step_input import TokenLogprobs
from graphserve.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from graphserve.models.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class ProcessedOutputs(msgspec.Struct):
    """Outputs to hand on, and core requests to abort because their text met a stop string (or could not be made)."""

    request_outputs: list[RequestOutput]
    core_ids_to_abort: list[str]


class OutputProcessor:
    """Keeps the text side of all running requests.

    Args:
        tokenizer: None if the engine runs without one; texts are then empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._token_texts: TokenTexts | None = None
        if tokenizer is not None:
            self._token_texts = TokenTexts(tokenizer, tokenizer.encode("a", add_special_tokens=False))
        self._requests: dict[str, _RequestState] = {}
        self._completions: dict[str, tuple[_RequestState, _Completion]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def add(self, processed: ProcessedInput, now: float) -> None:
        """Follow a request from here on; ``now`` in seconds of the monotonic clock."""
        state = _RequestState(processed, self._tokenizer, now)
        self._requests[processed.request_id] = state
        for core_request, completion in zip(processed.core_requests, state.completions, strict=True):
            self._completions[core_request.request_id] = state, completion

    def remove(self, request_id: str) -> list[str]:
        """Forget a request; the ids of its core requests that have not ended. Unknown ids are ignored."""
        state = self._requests.pop(request_id, None)
        if state is None:
            return []
        running = [c.core_id for c in state.completions if c.finish_reason is None]
        for core_id in running:
            del self._completions[core_id]
        return running

    def process(self, core_outputs: Iterable[EngineCoreOutput], now: float) -> ProcessedOutputs:
        """Take in the outputs of one step."""
        changed: dict[str, tuple[_RequestState, list[_Completion]]] = {}
        to_abort: list[str] = []
        for core_output in core_outputs:
            found = self._completions.get(core_output.request_id)
            if found is None:
                continue  # aborted while the step ran
            state, completion = found
            try:
                has_stopped = completion.update(core_output)
            except BaseException as error:  # a panic of the tokenizer library is no Exception
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                logger.exception("the output of request %s cannot be processed", state.request_id)
                completion.fail(f"{type(error).__name__}: {error}")
                has_stopped = True
            if has_stopped and core_output.finish_reason is None:
                to_abort.append(completion.core_id)
            if completion.finish_reason is not None:
                del self._completions[completion.core_id]
            state.note_progress(core_output, now)
            if core_output.new_token_ids or completion.finish_reason is not None:
                changed.setdefault(state.request_id, (state, []))[1].append(completion)
        outputs = []
        for state, completions in changed.values():
            if state.is_finished:
                del self._requests[state.request_id]
                state.metrics.finished_time = now
            output = state.output(completions, self._token_texts)
            if output is not None:
                outputs.append(output)
        return ProcessedOutputs(outputs, to_abort)


class _Completion:
    """One of a request's completions."""

    def __init__(self, index: int, core_request: EngineCoreRequest, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.core_id = core_request.request_id
        params = core_request.params
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, core_request.prompt_token_ids, params)
        self._eos_token_ids = core_request.eos_token_ids
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self._num_given_tokens = 0

    def update(self, core_output: EngineCoreOutput) -> bool:
        """Take in a step's output; True if the completion has ended."""
        self.token_ids.extend(core_output.new_token_ids)
        self.prompt_logprobs.extend(core_output.prompt_logprobs or ())
        if self.logprobs is not None:
            self.logprobs.extend(core_output.logprobs or ())
            self.cumulative_logprob += sum(entry.logprobs[0] for entry in core_output.logprobs or ())
        self.finish_reason, self.stop_reason = core_output.finish_reason, core_output.stop_reason
        self.error = core_output.error
        if self._detokenizer is not None:
            is_stop_token = core_output.finish_reason == "stop"
            stop_string = self._detokenizer.update(core_output.new_token_ids, is_stop_token)
            if stop_string is not None:
                self.finish_reason, self.stop_reason = "stop", stop_string
            elif self.finish_reason is not None:
                self._detokenizer.finish()
        return self.finish_reason is not None

    def fail(self, message: str) -> None:
        self.finish_reason, self.stop_reason, self.error = "error", None, message

    def output(self, is_delta: bool, texts: TokenTexts | None) -> CompletionOutput:
        """What is new since the last call (delta), or everything."""
        is_finished = self.finish_reason is not None
        text = ""
        if self._detokenizer is not None:
            text = self._detokenizer.next_delta(is_finished) if is_delta else self._detokenizer.text(is_finished)
        begin = self._num_given_tokens if is_delta else 0
        self._num_given_tokens = len(self.token_ids)
        logprobs = None
        if self.logprobs is not None:
            logprobs = [_position(entry, texts) for entry in self.logprobs[begin:]]
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self.token_ids[begin:],
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class _RequestState:
    """A request and its completions."""

    def __init__(self, processed: ProcessedInput, tokenizer: Tokenizer | None, now: float) -> None:
        self.request_id = processed.request_id
        self._prompt = processed.prompt
        self._prompt_token_ids = processed.prompt_token_ids
        self._params = processed.params
        self.completions = [
            _Completion(index, core_request, tokenizer) for index, core_request in enumerate(processed.core_requests)
        ]
        self.metrics = RequestMetrics(arrival_time=now)

    @property
    def is_finished(self) -> bool:
        return all(c.finish_reason is not None for c in self.completions)

    def note_progress(self, core_output: EngineCoreOutput, now: float) -> None:
        if core_output.new_token_ids:
            if self.metrics.first_token_time is None:
                self.metrics.first_token_time = now
            self.metrics.last_token_time = now
        self.metrics.num_preemptions = max(self.metrics.num_preemptions, core_output.num_preemptions)

    def output(self, changed: list[_Completion], texts: TokenTexts | None) -> RequestOutput | None:
        """The output after a step that changed some completions; None if there is none to give yet."""
        kind = self._params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not self.is_finished:
            return None
        is_delta = kind is RequestOutputKind.DELTA
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[c.output(is_delta, texts) for c in (changed if is_delta else self.completions)],
            finished=self.is_finished,
            prompt_logprobs=self._prompt_logprobs(texts),
            metrics=self.metrics,
            error=next((c.error for c in self.completions if c.error is not None), None),
        )

    def _prompt_logprobs(self, texts: TokenTexts | None) -> list[PositionLogprobs | None] | None:
        if self._params.prompt_logprobs is None:
            return None
        return [None, *(_position(entry, texts) for entry in self.completions[0].prompt_logprobs)]


def _position(entry: TokenLogprobs, texts: TokenTexts | None) -> PositionLogprobs:
    """One position as callers see it. The first token has its own rank, the others are in order of rank."""
    position: PositionLogprobs = {}
    for place, (token_id, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
        rank = entry.rank if place == 0 else place
        if token_id not in position:
            position[token_id] = Logprob(logprob, rank, None if texts is None else texts[token_id])
    return position
