"""From engine options to a model that can run: find, check, take the stored plan or compile one, load weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphserve import plugins
from graphserve.config import EngineConfig
from graphserve.errors import ConfigError
from graphserve.models.checkpoint import Checkpoint
from graphserve.models.config import read_config_json
from graphserve.models.generation_config import GenerationDefaults, load_generation_defaults
from graphserve.models.hub import resolve_model
from graphserve.models.tokenizer import Tokenizer, load_tokenizer
from graphserve.models.weight_loading import run_program
from graphserve.plan.cache_dir import cache_dir
from graphserve.plan.store import PlanStore, StoredPlan, source_hash
from graphserve.progress import phase
from graphserve.runtime.model_runner import Backend, ModelRunner

if TYPE_CHECKING:
    from graphserve.compiler.build import BuildResult

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """Everything the engine needs of a model. ``tokenizer`` is None with ``skip_tokenizer_init``."""

    model_runner: ModelRunner
    tokenizer: Tokenizer | None
    generation_defaults: GenerationDefaults
    max_model_len: int


def load_model(config: EngineConfig, backend: Backend = "auto") -> LoadedModel:
    """Load the model that ``config`` names, compiling it unless its plan is stored.

    Order: what can be refused cheaply is refused first (config, tokenizer, weight headers), then the model is compiled,
    then the weights are read. With a stored plan neither Dynamo nor `transformers` is imported.

    Raises:
        ConfigError: an option or the model's config cannot be served.
        CheckpointError: the weights are missing, damaged or of the wrong shape.
        UnsupportedModelError: the model computes something the compiler refuses.
    """
    device = _device(config)
    with phase("find model"):
        folder = find_model(config)
    tokenizer = None
    if not config.skip_tokenizer_init:
        with phase("load tokenizer"):
            tokenizer_folder = folder
            if config.tokenizer is not None:
                tokenizer_folder = resolve_model(config.tokenizer, None, config.download_dir, config.hf_token)
            tokenizer = load_tokenizer(tokenizer_folder)
    if config.load_format == "dummy":
        built, parameters = _dummy_model(config, folder)
        plan, constants = built.plan, built.constants
    else:
        stored = find_or_compile(config, folder, PlanStore(cache_dir()))
        plan, constants = stored.plan, stored.constants
        parameters = run_program(stored.weight_program, folder)
    with phase("load weights", unit="tensors") as work:

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            for item in parameters:
                work.advance()
                yield item

        runner = ModelRunner(plan, counted(), constants, device, backend)
    defaults = load_generation_defaults(
        folder,
        plan.model["eos_token_id"],
        tokenizer.eos_token_id if tokenizer is not None else None,
        config.generation_config,
    )
    return LoadedModel(runner, tokenizer, defaults, plan.model["max_model_len"])


def find_model(config: EngineConfig) -> Path:
    """The folder of the model that ``config`` names, downloaded if need be."""
    return resolve_model(config.model, config.revision, config.download_dir, config.hf_token)


def key_factors(config: EngineConfig, folder: Path) -> dict[str, Any]:
    """Everything a stored plan depends on. Reads config.json and the weight files' headers, nothing else.

    Raises:
        ConfigError: the folder has no safetensors checkpoint.
    """
    checkpoint = Checkpoint.open(folder)
    layout = sorted((name, entry.dtype, list(entry.shape)) for name, entry in checkpoint.tensors.items())
    model_config = read_config_json(folder)
    return {
        "config": hashlib.sha256(json.dumps(model_config, sort_keys=True).encode()).hexdigest(),
        "checkpoint layout": hashlib.sha256(json.dumps(layout).encode()).hexdigest(),
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "quantization": config.quantization,
        "graphserve sources": source_hash(),
        "torch": metadata.version("torch").split("+")[0],
        "transformers": metadata.version("transformers"),
        "plugins": plugins.versions(),
    }


def find_or_compile(config: EngineConfig, folder: Path, store: PlanStore) -> StoredPlan:
    """The plan of a checkpoint, from the store or compiled now (and then stored)."""
    factors = key_factors(config, folder)
    with phase("find stored plan") as work:
        stored = store.load(factors)
        work.note = "found" if stored is not None else "none, compiling"
    if stored is not None:
        return stored
    stored, is_reusable = _compile_checkpoint(config, folder)
    if is_reusable:
        with phase("store plan"):
            store.save(factors, stored)
    return stored


def _compile_checkpoint(config: EngineConfig, folder: Path) -> tuple[StoredPlan, bool]:
    """Compile, and whether the result serves every checkpoint of this layout."""
    with phase("import transformers"):
        from graphserve.compiler.capture import register_interfaces
        from graphserve.models.weight_loading import check_checkpoint, stored_dtype

        register_interfaces()
    with phase("check weights"):
        meta, max_model_len = build_meta(config, folder, stored_dtype(folder))
        program = check_checkpoint(meta, folder)
        stored_names = set(Checkpoint.open(folder).tensors)
    built = compile_model(meta, max_model_len, quantization=config.quantization)
    # A tied pair that is stored twice was compared by value, which says nothing of another checkpoint.
    is_reusable = not stored_names.intersection(program.aliases)
    return StoredPlan(built.plan, program, built.constants), is_reusable


def _dummy_model(config: EngineConfig, folder: Path) -> tuple[BuildResult, Iterator[tuple[str, torch.Tensor]]]:
    from graphserve.compiler.capture import register_interfaces
    from graphserve.models.weight_loading import dummy_parameters

    register_interfaces()
    meta, max_model_len = build_meta(config, folder, None)
    built = compile_model(meta, max_model_len, quantization=config.quantization)
    return built, dummy_parameters(meta, config.seed)


def build_meta(config: EngineConfig, folder: Path, stored: torch.dtype | None) -> tuple[Any, int]:
    """The model on the meta device, its RoPE made static, and the longest context it serves.

    Args:
        stored: dtype of the checkpoint's tensors, for ``dtype="auto"`` where the config names none.
    """
    from graphserve.models.config import derive_max_model_len, load_config, resolve_dtype
    from graphserve.models.meta_model import build_meta_model
    from graphserve.models.rope import bake_rope

    hf_config = load_config(folder)
    max_model_len = derive_max_model_len(hf_config, config.max_model_len)
    meta = build_meta_model(hf_config, resolve_dtype(config.dtype, hf_config, stored))
    bake_rope(meta, max_model_len)
    return meta, max_model_len


def compile_model(
    meta: Any, max_model_len: int, dump_dir: Path | None = None, quantization: str | None = None
) -> BuildResult:
    """Compile a meta model, its stages shown in the phase's note. ``dump_dir`` takes the graph around each pass."""
    from graphserve.compiler.build import build_plan
    from graphserve.models.meta_model import non_persistent_buffers

    with phase("compile") as work:
        buffers = non_persistent_buffers(meta)
        built = build_plan(meta, max_model_len, buffers, quantization=quantization, dump_dir=dump_dir)
        work.note = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in built.seconds.items())
    for note in built.notes:
        logger.info("%s", note)
    return built


def _device(config: EngineConfig) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("device='cuda', but torch sees no CUDA device: use device='cpu' or install a CUDA torch")
    return torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
