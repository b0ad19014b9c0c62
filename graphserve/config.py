"""Engine options: names and meanings are vLLM's. No torch here, so the command line stays quick."""

from __future__ import annotations

import difflib
import logging
from typing import Any, Literal, get_args

import msgspec

from graphserve.errors import ConfigError

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "float", "bfloat16", "float16", "half"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
Start = Literal["full", "tiered"]
Quantization = Literal["fp8_per_channel", "int8_w8a8"]

DEFAULT_MAX_NUM_SEQS = 64
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
DEMO_MODEL = "demo"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every option of an engine. Build it with :meth:`from_kwargs`, which explains what is wrong with an option.

    Attributes:
        model: local folder, hub id, or ``"demo"`` for the embedded model.
        tokenizer: folder or hub id of the tokenizer, None for the model's own.
        revision: branch, tag or commit on the hub.
        hf_token: token for private hub repositories.
        download_dir: where hub files are kept, None for the hub's cache.
        trust_remote_code: always False; code from a checkpoint is never run.
        load_format: ``dummy`` makes random weights from the config alone.
        dtype: ``auto`` takes the checkpoint's.
        device: ``auto`` takes a GPU if there is one.
        quantization: linear layers run on 8-bit weights and activations, made from 16-bit weights at load: fp8 with one
            scale an output channel and one a token, or int8 with the same scales. The head, routers and experts keep
            their weights. None leaves all as they are.
        max_model_len: longest prompt plus output in tokens, None for the model's own limit.
        max_num_seqs: most requests in one step.
        max_num_batched_tokens: most tokens in one step, None for 2048 (or more, if ``max_num_seqs`` or a prompt that
            may not be chunked needs more).
        enable_chunked_prefill: a prompt may be spread over several steps.
        block_size: tokens in one KV block.
        num_gpu_blocks_override: exact number of KV blocks (on any device), None to size the pool by memory.
        kv_cache_memory_bytes: memory of the KV pool, None for a share of what is free.
        gpu_memory_utilization: share of the GPU's memory that this engine may take in all, and that has to be free. Of
            no effect where the KV pool's size is set.
        enforce_eager: no padding of steps to bucket sizes (and no captured graphs).
        cudagraph_capture_sizes: requests of the decode steps that a GPU captures as graphs, None for 1, 2, 4, 8, then
            steps of 8 up to 256; those above ``max_num_seqs`` are left out.
        deterministic: a request's logits have the same bits whatever else is in a step and whatever its bucket, at some
            cost in speed (vLLM: the environment variable VLLM_BATCH_INVARIANT). Refused where a launch has no kernel
            that keeps this.
        seed: source of the seeds of requests that bring none.
        skip_tokenizer_init: prompts must be token ids, outputs carry no text.
        generation_config: ``auto`` takes sampling defaults from the model's folder, ``vllm`` takes none, anything else
            is a folder with a ``generation_config.json``.
        override_generation_config: values that replace those of the generation config.
        compile_cache: folder or ``.tar.zst`` made by ``graphserve warmup --output``, None for the user's cache
            (``GRAPHSERVE_CACHE``, else ``~/.cache/graphserve``).
        strict_compile_cache: nothing is compiled: whatever is not in the compile cache is an error.
        start: ``full`` compiles everything before the first request; ``tiered`` answers at once with plain torch
            launches where kernels are missing, and changes to compiled ones when they are ready.
        max_logprobs: most log-probabilities a position may report, -1 for no limit.
        served_model_name: name(s) under which a server offers the model.
        disable_log_stats: no periodic statistics in the log.
    """

    model: str = DEMO_MODEL
    tokenizer: str | None = None
    revision: str | None = None
    hf_token: str | None = None
    download_dir: str | None = None
    trust_remote_code: bool = False
    load_format: LoadFormat = "auto"
    dtype: Dtype = "auto"
    device: Device = "auto"
    quantization: Quantization | None = None
    max_model_len: int | None = None
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    max_num_batched_tokens: int | None = None
    enable_chunked_prefill: bool = True
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    enforce_eager: bool = False
    cudagraph_capture_sizes: list[int] | None = None
    deterministic: bool = False
    seed: int = 0
    skip_tokenizer_init: bool = False
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] = msgspec.field(default_factory=dict)
    compile_cache: str | None = None
    strict_compile_cache: bool = False
    start: Start = "full"
    max_logprobs: int = 20
    served_model_name: str | list[str] | None = None
    disable_log_stats: bool = False

    def __post_init__(self) -> None:
        if self.trust_remote_code:
            raise ConfigError(
                "trust_remote_code=True is refused: code from a checkpoint is never run. Use an architecture that the "
                "installed transformers has (upgrade transformers if it is new), and leave trust_remote_code out"
            )
        _require_choice("load_format", self.load_format, get_args(LoadFormat))
        _require_choice("dtype", self.dtype, get_args(Dtype))
        _require_choice("device", self.device, get_args(Device))
        _require_choice("start", self.start, get_args(Start))
        if self.quantization is not None:
            _require_choice("quantization", self.quantization, get_args(Quantization))
        _require_at_least("max_num_seqs", self.max_num_seqs, 1)
        _require_at_least("block_size", self.block_size, 1)
        for name in ("max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"):
            if getattr(self, name) is not None:
                _require_at_least(name, getattr(self, name), 1)
        for size in self.cudagraph_capture_sizes or ():
            _require_at_least("cudagraph_capture_sizes", size, 1)
        if self.num_gpu_blocks_override is not None:
            # Block 0 is reserved, so two blocks are the least that can hold a token.
            _require_at_least("num_gpu_blocks_override", self.num_gpu_blocks_override, 2)
        _require_at_least("max_logprobs", self.max_logprobs, -1)
        _require_int("seed", self.seed)
        if not isinstance(self.gpu_memory_utilization, (int, float)) or not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization!r} is not allowed: it must be in (0, 1]"
            )
        if self.deterministic and self.start == "tiered":
            raise ConfigError(
                "deterministic=True with start='tiered' is not allowed: the first answers would come from plain torch, "
                "and their bits would depend on the batch. Use start='full'"
            )
        budget = self.max_num_batched_tokens
        if budget is not None and budget < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={budget} is less than max_num_seqs={self.max_num_seqs}: every running request "
                f"needs one token a step; raise it, or lower max_num_seqs to at most {budget}"
            )

    @classmethod
    def from_kwargs(cls, **options: Any) -> EngineConfig:
        """Build a config from named options.

        Raises:
            ConfigError: a name is unknown (with the closest known one) or a value is of the wrong type or range.
        """
        for name, value in options.items():
            if name not in cls.__struct_fields__:
                close = difflib.get_close_matches(name, cls.__struct_fields__, n=1)
                hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(cls.__struct_fields__)}"
                raise ConfigError(f"unknown engine option {name}={value!r}: {hint}")
        try:
            # convert checks the types, which a plain call does not
            return msgspec.convert(options, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"wrong engine option: {error}") from error

    def to_kwargs(self) -> dict[str, Any]:
        """The options as plain data, accepted by :meth:`from_kwargs`."""
        return msgspec.structs.asdict(self)

    def token_budget(self, max_model_len: int) -> int:
        """Most tokens in one step for a model of this context length.

        Raises:
            ConfigError: chunked prefill is off and the given budget cannot hold the longest prompt.
        """
        if self.max_num_batched_tokens is None:
            budget = max(DEFAULT_MAX_NUM_BATCHED_TOKENS, self.max_num_seqs)
            return budget if self.enable_chunked_prefill else max(budget, max_model_len)
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_model_len={max_model_len} and "
                "enable_chunked_prefill=False: a long prompt could never run. Raise max_num_batched_tokens, lower "
                "max_model_len or allow chunked prefill"
            )
        return self.max_num_batched_tokens


def _require_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is not allowed: it must be an integer")


def _require_at_least(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}={value!r} is not allowed: it must be an integer >= {low}")


def _require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not allowed: it must be one of {', '.join(allowed)}")
