"""An :class:`LLMEngine` in the form that the engine process serves: deltas out, one error a failed request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from graphserve import progress
from graphserve.config import EngineConfig
from graphserve.engine.early_checks import find_model
from graphserve.engine.messages import (
    AddRequest,
    ConvertedTokenizer,
    EngineInfo,
    EngineStats,
    OutputDelta,
    RequestEnded,
    TokenizerSource,
)
from graphserve.models.hub import resolve_model
from graphserve.outputs import RequestOutput
from graphserve.sampling_params import SamplingParams
from graphserve.startup import import_turn, without_collector

if TYPE_CHECKING:
    from graphserve.engine.llm_engine import LLMEngine
    from graphserve.models.tokenizer import Tokenizer


class ServedEngine:
    """Adapts an engine; owns it."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._has_begun: set[str] = set()  # requests whose first delta is out
        self.info = _info(engine)

    def add(self, request: AddRequest) -> None:
        """Queue a request; its token ids were made by the caller.

        Raises:
            RequestError: it cannot be served.
        """
        prompt = {"prompt": request.prompt, "prompt_token_ids": request.prompt_token_ids}
        self._engine.add_request(request.request_id, prompt, request.params)

    def abort(self, request_ids: list[str]) -> None:
        self._engine.abort(*request_ids)
        self._has_begun.difference_update(request_ids)

    def step(self) -> tuple[list[OutputDelta], list[RequestEnded]]:
        """Run one step: what it added, and the requests that failed in it."""
        deltas: list[OutputDelta] = []
        ended: list[RequestEnded] = []
        for output in self._engine.step():
            if output.error is not None:
                # the failure of one choice ends the whole request: a client cannot use the others alone
                ended.append(RequestEnded(output.request_id, output.error, None, False))
                self.abort([output.request_id])
            else:
                deltas.extend(self._deltas(output))
        return deltas, ended

    def has_unfinished_requests(self) -> bool:
        return self._engine.has_unfinished_requests()

    def stats(self) -> EngineStats:
        return msgspec.convert(self._engine.stats(), EngineStats, from_attributes=True)

    def close(self) -> None:
        self._engine.close()

    def _deltas(self, output: RequestOutput) -> list[OutputDelta]:
        is_first = output.request_id not in self._has_begun
        self._has_begun.add(output.request_id)
        if output.finished:
            self._has_begun.discard(output.request_id)
        return [
            OutputDelta(
                output.request_id,
                completion.index,
                completion.text,
                completion.token_ids,
                completion.logprobs,
                completion.finish_reason,
                completion.stop_reason,
                output.num_cached_tokens,
                output.prompt_logprobs if is_first and place == 0 else None,
            )
            for place, completion in enumerate(output.outputs)
        ]


def _info(engine: LLMEngine) -> EngineInfo:
    config = engine.config
    names = config.served_model_name or config.model
    return EngineInfo(
        model=config.model,
        served_model_names=[names] if isinstance(names, str) else names,
        max_model_len=engine.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_logprobs=config.max_logprobs,
        vocab_size=engine.vocab_size,
        num_blocks=engine.num_blocks,
        block_size=config.block_size,
        default_sampling_params=changed_fields(engine.default_sampling_params()),
    )


def changed_fields(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from SamplingParams' own defaults: what the model's generation config asks for."""
    return {
        field.name: getattr(params, field.name)
        for field in msgspec.structs.fields(SamplingParams)
        if getattr(params, field.name) != field.default
    }


def load_engine(config: dict[str, Any], send_tokenizer: Callable[[TokenizerSource], None]) -> ServedEngine:
    """Load and compile the model that ``config`` (fields of ``EngineConfig``) describes.

    Args:
        send_tokenizer: called once, as soon as it is known where the API process has its tokenizer from.

    Raises:
        GraphserveError: it cannot be loaded or compiled.
    """
    options = EngineConfig.from_kwargs(**config)
    # First of all: what is wrong with the options is reported, and a download seen, before torch has been imported.
    source = _early_source(options, find_model(options, progress.byte_reporter()))
    if source is not None:
        send_tokenizer(source)
    with without_collector():
        with progress.phase("import torch"), import_turn():
            # The engine needs them; here their import has a phase of its own.
            import graphserve.engine.model_executor
            import graphserve.runtime.load  # noqa: F401
        from graphserve.engine.llm_engine import LLMEngine

        engine = LLMEngine.from_config(options)
    if source is None:
        assert engine.tokenizer is not None
        send_tokenizer(TokenizerSource(converted=converted_tokenizer(engine.tokenizer)))
    return ServedEngine(engine)


def _early_source(options: EngineConfig, model: Path) -> TokenizerSource | None:
    """Where the tokenizer is, if it is there already: not one that has to be converted."""
    if options.skip_tokenizer_init:
        return TokenizerSource()
    folder = model
    if options.tokenizer is not None:
        reporter = progress.byte_reporter()
        folder = resolve_model(options.tokenizer, None, options.download_dir, options.hf_token, reporter)
    return TokenizerSource(str(folder)) if (folder / "tokenizer.json").is_file() else None


def converted_tokenizer(tokenizer: Tokenizer) -> ConvertedTokenizer:
    """A tokenizer as a message."""
    return ConvertedTokenizer(tokenizer.backend.to_str(), tokenizer.special_tokens, tokenizer.chat_templates)
