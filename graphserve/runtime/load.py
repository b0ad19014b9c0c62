"""From engine options to a model that can run: resolve, check, compile, load."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphserve.config import EngineConfig
from graphserve.errors import ConfigError
from graphserve.models.generation_config import GenerationDefaults, load_generation_defaults
from graphserve.models.hub import resolve_model
from graphserve.models.tokenizer import Tokenizer, load_tokenizer
from graphserve.progress import phase
from graphserve.runtime.model_runner import Backend, ModelRunner

if TYPE_CHECKING:
    from graphserve.compiler.build import BuildResult

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """Everything the engine needs of a model.

    Attributes:
        tokenizer: None if the engine was started with ``skip_tokenizer_init``.
        hf_config: the model's config.json values.
    """

    model_runner: ModelRunner
    tokenizer: Tokenizer | None
    generation_defaults: GenerationDefaults
    hf_config: dict[str, Any]
    max_model_len: int


def load_model(config: EngineConfig, backend: Backend = "auto") -> LoadedModel:
    """Load and compile the model that ``config`` names.

    Order: what can be refused cheaply is refused first (config, tokenizer, weight headers), then the model is compiled,
    then the weights are read.

    Raises:
        ConfigError: an option or the model's config cannot be served.
        CheckpointError: the weights are missing, damaged or of the wrong shape.
        UnsupportedModelError: the model computes something the compiler refuses.
    """
    device = _device(config)
    with phase("find model"):
        folder = _resolve(config, config.model, config.revision)
    tokenizer = None
    if not config.skip_tokenizer_init:
        with phase("load tokenizer"):
            tokenizer = load_tokenizer(_resolve(config, config.tokenizer, None) if config.tokenizer else folder)
    with phase("import torch and transformers"):
        # Here and not at the top: a warm start from a stored plan does without them.
        from graphserve.compiler.capture import register_interfaces
        from graphserve.models.config import derive_max_model_len, load_config, resolve_dtype
        from graphserve.models.weight_loading import check_checkpoint, dummy_parameters, run_program, stored_dtype

        register_interfaces()
    hf_config = load_config(folder)
    max_model_len = derive_max_model_len(hf_config, config.max_model_len)
    has_weights = config.load_format != "dummy"
    dtype = resolve_dtype(config.dtype, hf_config, stored_dtype(folder) if has_weights else None)
    with phase("check weights"):
        meta = build_meta(hf_config, dtype, max_model_len)
        program = check_checkpoint(meta, folder) if has_weights else None
    built = compile_model(meta, max_model_len)
    for note in built.notes:
        logger.info("%s", note)
    with phase("load weights") as work:
        source = run_program(program, folder) if program is not None else dummy_parameters(meta, config.seed)

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in source:
                work.advance()
                yield name, tensor

        runner = ModelRunner(built.plan, counted(), built.constants, device, backend)
        work.note = f"{runner.weight_bytes / 2**20:.0f} MiB"
    defaults = load_generation_defaults(
        folder,
        getattr(hf_config, "eos_token_id", None),
        tokenizer.eos_token_id if tokenizer is not None else None,
        config.generation_config,
    )
    return LoadedModel(runner, tokenizer, defaults, hf_config.to_dict(), max_model_len)


def build_meta(hf_config: Any, dtype: torch.dtype, max_model_len: int) -> Any:
    """The model on the meta device, its RoPE made static for ``max_model_len``."""
    from graphserve.models.meta_model import build_meta_model
    from graphserve.models.rope import bake_rope

    meta = build_meta_model(hf_config, dtype)
    bake_rope(meta, max_model_len)
    return meta


def compile_model(meta: Any, max_model_len: int) -> BuildResult:
    """Compile a meta model, each stage shown as a phase."""
    from graphserve.compiler.build import build_plan
    from graphserve.models.meta_model import non_persistent_buffers

    with phase("compile") as work:
        built = build_plan(meta, max_model_len, non_persistent_buffers(meta))
        work.note = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in built.seconds.items())
    return built


def _resolve(config: EngineConfig, name: str, revision: str | None) -> Path:
    return resolve_model(name, revision, config.download_dir, config.hf_token)


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device='cuda', but torch sees no CUDA device: use device='cpu' or install a CUDA torch")
        return torch.device("cuda")
    return torch.device("cpu")
