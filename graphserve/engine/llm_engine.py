"""The engine that callers drive: requests in, steps, outputs out. Single-threaded and synchronous."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from graphserve.config import EngineConfig
from graphserve.engine.engine_core import EngineCore, EngineCoreStats
from graphserve.engine.executor import Executor
from graphserve.engine.input_processor import InputProcessor, ModelLimits, ProcessedInput, Prompt
from graphserve.engine.make_executor import make_executor
from graphserve.engine.output_processor import OutputProcessor
from graphserve.engine.scheduler import SchedulerLimits
from graphserve.errors import ConfigError, EngineDeadError, RequestError
from graphserve.models.generation_config import GenerationDefaults, override
from graphserve.outputs import RequestOutput
from graphserve.runtime.kv_pool_size import KVPoolRequirements, plan_num_blocks
from graphserve.runtime.memory_plan import PROMPT_LOGPROBS_ROWS
from graphserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from graphserve.models.tokenizer import Tokenizer
    from graphserve.runtime.load import LoadedModel

logger = logging.getLogger(__name__)


class LLMEngine:
    """Continuous batching over one model.

    Invariant: every request that was added ends in exactly one way: a finished output, an output with ``error``, or
    :meth:`abort`. After an exception from :meth:`step` the engine is dead and every call raises
    :class:`EngineDeadError`.

    Attributes:
        config: the options it was built from.
        tokenizer: None with ``skip_tokenizer_init``.
        max_model_len: longest prompt plus output in tokens.
        vocab_size: logits a row.
        num_blocks: KV blocks, null block included.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        generation: GenerationDefaults,
        pool_bytes: int,
    ) -> None:
        generation = override(generation, config.override_generation_config)
        limits = SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.token_budget(max_model_len),
            max_logits_rows=config.max_num_seqs + PROMPT_LOGPROBS_ROWS,
            enable_chunked_prefill=config.enable_chunked_prefill,
        )
        requirements = KVPoolRequirements(
            groups=executor.cache_groups,
            bytes_per_token=executor.kv_bytes_per_token,
            block_size=config.block_size,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_chunk=min(max_model_len, limits.max_num_batched_tokens),
        )
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = executor.vocab_size
        self.num_blocks = plan_num_blocks(requirements, pool_bytes, config.num_gpu_blocks_override)
        self._default_sampling = generation.sampling
        self.input_processor = InputProcessor(
            tokenizer,
            ModelLimits(executor.vocab_size, max_model_len, config.max_logprobs, generation.eos_token_ids, config.seed),
        )
        self._output_processor = OutputProcessor(tokenizer)
        self._core: EngineCore | None = EngineCore(
            executor, limits, self.num_blocks, config.block_size, pad_steps=not config.enforce_eager
        )
        self._death: BaseException | None = None
        self._is_sleeping = False
        logger.info(
            "KV cache: %d blocks of %d tokens, %.1f MiB",
            self.num_blocks,
            config.block_size,
            self.num_blocks * requirements.block_bytes / 2**20,
        )

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLMEngine:
        """Load and compile the model, and make an engine for it.

        Raises:
            GraphserveError: the model cannot be loaded or compiled, or an option does not fit it.
        """
        from graphserve.runtime.load import load_model

        return cls.from_loaded(config, load_model(config))

    @classmethod
    def from_loaded(cls, config: EngineConfig, loaded: LoadedModel) -> LLMEngine:
        """An engine for a loaded model. Takes over its runner, and closes it if no engine comes of it."""
        with ExitStack() as undo:
            undo.callback(loaded.model_runner.close)
            executor = make_executor(config, loaded.model_runner)
            undo.callback(executor.close)
            engine = cls(
                config,
                executor,
                loaded.tokenizer,
                loaded.max_model_len,
                loaded.generation_defaults,
                loaded.memory.kv_bytes,
            )
            undo.pop_all()
        return engine

    def add_request(
        self, request_id: str, prompt: Prompt | ProcessedInput, params: SamplingParams | None = None
    ) -> None:
        """Queue a request.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, token ids, a dict with ``prompt`` or ``prompt_token_ids``, or what
                ``input_processor.process`` made of one of these (with its parameters).
            params: None takes the model's defaults.

        Raises:
            RequestError: the request cannot be served, or the engine sleeps; nothing has been queued.
            EngineDeadError: the engine has stopped.
        """
        core = self._living_core()
        if self._is_sleeping:
            raise RequestError("the engine sleeps: call wake_up() before the request")
        if request_id in self._output_processor:
            raise RequestError(f"request id {request_id!r} is in use: choose another", param="request_id")
        if not isinstance(prompt, ProcessedInput):
            if params is None:
                params = self.default_sampling_params()
            if not isinstance(params, SamplingParams):
                raise RequestError(f"params={params!r} is not allowed: it must be a SamplingParams", param="params")
            prompt = self.input_processor.process(request_id, prompt, params)
        added: list[str] = []
        try:
            for core_request in prompt.core_requests:
                core.add_request(core_request)
                added.append(core_request.request_id)
        except RequestError:
            core.abort(added)
            raise
        self._output_processor.add(prompt, time.monotonic())

    def step(self) -> list[RequestOutput]:
        """Compute one step; what is new, as each request's ``output_kind`` wants it.

        Raises:
            EngineDeadError: the step failed as a whole (the cause is chained), now or earlier.
        """
        core = self._living_core()
        try:
            core_outputs = core.step()
            processed = self._output_processor.process(core_outputs, time.monotonic())
            core.abort(processed.core_ids_to_abort)
        except Exception as error:
            raise self._die(core, error) from error
        return processed.request_outputs

    def abort(self, *request_ids: str) -> None:
        """End requests without further output; ids that are unknown or ended are ignored.

        If no request is left, this waits for the step that is being computed.

        Raises:
            EngineDeadError: that step failed.
        """
        core_ids = [core_id for request_id in request_ids for core_id in self._output_processor.remove(request_id)]
        core = self._core
        if core is None or self._death is not None:
            return
        try:
            core.abort(core_ids)
        except Exception as error:
            raise self._die(core, error) from error

    def abort_request(self, request_id: str) -> None:
        """The same as :meth:`abort` for one request, under vLLM's name."""
        self.abort(request_id)

    def has_unfinished_requests(self) -> bool:
        return self._output_processor.num_requests > 0

    def get_num_unfinished_requests(self) -> int:
        return self._output_processor.num_requests

    def default_sampling_params(self) -> SamplingParams:
        """Sampling parameters of requests that bring none: the model's generation config over our defaults."""
        return SamplingParams(**self._default_sampling)

    def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and KV cache back until :meth:`wake_up`; requests are refused meanwhile.

        On a GPU all of both goes, and comes back at the same addresses, so that captured graphs stay. On a CPU, where
        the weights are in host memory as it is, level 1 gives the KV cache back only. Nothing happens to an engine that
        sleeps already.

        Args:
            level: 1 keeps the weights in the host's memory, 2 reads the checkpoint again at :meth:`wake_up`.

        Raises:
            RequestError: a request has not ended.
            ConfigError: the level is not 1 or 2, or level 2 and the weights cannot be read again.
        """
        if level not in (1, 2):
            raise ConfigError(
                f"level={level!r} is not allowed: 1 keeps the weights in host memory, 2 reads the checkpoint again"
            )
        core = self._living_core()
        if self._is_sleeping:
            return
        if self.has_unfinished_requests():
            raise RequestError(
                f"{self.get_num_unfinished_requests()} requests have not ended: run them to their end or abort them "
                "before the engine sleeps"
            )
        core.sleep(level)
        self._is_sleeping = True

    def wake_up(self) -> None:
        """Take memory and weights back. Nothing happens to an engine that is awake; one that fails here sleeps on.

        Raises:
            DeviceError: the device has not enough free memory now.
            CheckpointError: after level 2, the checkpoint cannot be read any more.
        """
        core = self._living_core()
        if self._is_sleeping:
            core.wake_up()
            self._is_sleeping = False

    def is_sleeping(self) -> bool:
        return self._is_sleeping

    def stats(self) -> EngineCoreStats:
        """Counters and gauges of now."""
        return self._living_core().stats()

    def close(self) -> None:
        """End all requests and give weights, KV cache and buffers back. May be called more than once."""
        core, self._core = self._core, None
        if core is not None and self._death is None:
            core.close()

    def _die(self, core: EngineCore, error: Exception) -> EngineDeadError:
        """After a failed step the state of cache and queues is unknown: give everything back for good."""
        self._death = error
        core.close()
        return EngineDeadError(f"the engine stopped in a step: {type(error).__name__}: {error}")

    def _living_core(self) -> EngineCore:
        if self._death is not None:
            raise EngineDeadError(f"the engine has stopped: {self._death}: make a new one") from self._death
        if self._core is None:
            raise EngineDeadError("the engine is closed: make a new one")
        return self._core
