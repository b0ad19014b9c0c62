"""An :class:`LLMEngine` in the form that the engine process serves: deltas out, one error a failed request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from graphserve import progress
from graphserve.config import EngineConfig
from graphserve.engine.messages import AddRequest, EngineInfo, EngineStats, OutputDelta, RequestEnded
from graphserve.models.hub import resolve_model
from graphserve.outputs import RequestOutput
from graphserve.sampling_params import SamplingParams
from graphserve.startup import import_turn, without_collector

if TYPE_CHECKING:
    from graphserve.engine.llm_engine import LLMEngine


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
        compile_cache=config.compile_cache,
        tokenizer_path=None if engine.tokenizer is None else str(_tokenizer_folder(config)),
        max_model_len=engine.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_logprobs=config.max_logprobs,
        vocab_size=engine.vocab_size,
        num_blocks=engine.num_blocks,
        block_size=config.block_size,
        default_sampling_params=changed_fields(engine.default_sampling_params()),
    )


def _tokenizer_folder(config: EngineConfig) -> Path:
    """Where the engine found its tokenizer; by now everything from the hub is in the local cache."""
    return _find(config.tokenizer, None, config) if config.tokenizer else _find(config.model, config.revision, config)


def _find(name: str, revision: str | None, config: EngineConfig) -> Path:
    return resolve_model(name, revision, config.download_dir, config.hf_token, progress.byte_reporter())


def changed_fields(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from SamplingParams' own defaults: what the model's generation config asks for."""
    return {
        field.name: getattr(params, field.name)
        for field in msgspec.structs.fields(SamplingParams)
        if getattr(params, field.name) != field.default
    }


def load_engine(config: dict[str, Any]) -> ServedEngine:
    """Load and compile the model that ``config`` (fields of ``EngineConfig``) describes.

    Raises:
        GraphserveError: it cannot be loaded or compiled.
    """
    options = EngineConfig.from_kwargs(**config)
    # First of all: a name that does not exist is reported, and a download seen, before torch has been imported.
    _find(options.model, options.revision, options)
    with without_collector():
        with import_turn():
            import graphserve.runtime.load  # noqa: F401
        from graphserve.engine.llm_engine import LLMEngine

        return ServedEngine(LLMEngine.from_config(options))
