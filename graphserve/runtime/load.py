"""From engine options to a model that can run: find, check, take the stored plan or compile one, load weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graphserve.artifacts import ArtifactStore, open_store
from graphserve.artifacts.eviction import keep_below_limit
from graphserve.config import EngineConfig
from graphserve.errors import ConfigError
from graphserve.kernels import register_all
from graphserve.models.generation_config import (
    GenerationDefaults,
    check_generation_options,
    load_generation_defaults,
)
from graphserve.models.hub import resolve_model
from graphserve.models.tokenizer import Tokenizer, load_tokenizer
from graphserve.models.weight_loading import run_program
from graphserve.plan.schema import Plan
from graphserve.progress import phase
from graphserve.runtime.choices import KIND as CHOICES
from graphserve.runtime.choices import MeasuredChoices, choice_factors, load_choices
from graphserve.runtime.find_plan import build_meta, compile_model, find_or_compile, folder_factors
from graphserve.runtime.memory import device_memory
from graphserve.runtime.memory_plan import MemoryPlan, plan_memory
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
    memory: MemoryPlan

    @property
    def max_model_len(self) -> int:
        """Longest request: the model's limit, or what the memory holds."""
        return self.memory.max_model_len


def load_model(config: EngineConfig, backend: Backend = "auto") -> LoadedModel:
    """Load the model that ``config`` names, compiling it unless its plan is stored.

    Order: what can be refused cheaply is refused first (config, tokenizer's files, weight headers), then the model is
    compiled, its memory is planned, and the weights are read. The tokenizer is loaded beside all that; once it has
    failed, no more weights are read. With a stored plan neither Dynamo nor `transformers` is imported.

    Raises:
        ConfigError: an option or the model's config cannot be served.
        CheckpointError: the weights are missing, damaged or of the wrong shape.
        UnsupportedModelError: the model computes something the compiler refuses.
    """
    check_generation_options(config.generation_config, config.override_generation_config)
    device = pick_device(config)
    store = open_store(config.compile_cache, config.strict_compile_cache)
    with phase("find model"):
        folder = find_model(config)
    check_generation_options(config.generation_config, config.override_generation_config, folder)
    with ThreadPoolExecutor(1, "tokenizer loader") as beside, ExitStack() as undo:
        tokenizer = None if config.skip_tokenizer_init else _start_tokenizer(config, folder, store, beside)
        runner, plan, memory = _load_runner(config, folder, store, device, backend, tokenizer)
        undo.callback(runner.close)
        with phase("load tokenizer"):  # what is left of it
            loaded = tokenizer.result() if tokenizer is not None else None
        undo.pop_all()
    if store.built:
        keep_below_limit(store)
    defaults = load_generation_defaults(
        folder,
        plan.model["eos_token_id"],
        loaded.eos_token_id if loaded is not None else None,
        config.generation_config,
    )
    return LoadedModel(runner, loaded, defaults, memory)


def _start_tokenizer(
    config: EngineConfig, folder: Path, store: ArtifactStore, beside: ThreadPoolExecutor
) -> Future[Tokenizer]:
    """Load the tokenizer beside the rest: a large one takes its time mostly without the interpreter's lock.

    One that has to be converted, which imports transformers, or that does not exist is waited for.
    """
    if config.tokenizer is not None:
        folder = resolve_model(config.tokenizer, None, config.download_dir, config.hf_token)
    tokenizer = beside.submit(load_tokenizer, folder, store=store)
    if not (folder / "tokenizer.json").is_file():
        with phase("convert tokenizer"):
            tokenizer.result()
    return tokenizer


def _raise_if_failed(tokenizer: Future[Tokenizer] | None) -> None:
    if tokenizer is not None and tokenizer.done():
        tokenizer.result()


def _load_runner(
    config: EngineConfig,
    folder: Path,
    store: ArtifactStore,
    device: torch.device,
    backend: Backend,
    tokenizer: Future[Tokenizer] | None,
) -> tuple[ModelRunner, Plan, MemoryPlan]:
    if config.load_format == "dummy":
        store.begin_build(f"the plan of {config.model} (load_format=dummy stores none)")
        built, parameters = _dummy_model(config, folder)
        plan, constants = built.plan, built.constants
    else:
        found = find_or_compile(config, folder, store)
        plan, constants = found.compiled.plan, found.compiled.constants
        assert found.weight_program is not None
        parameters = partial(run_program, found.weight_program, folder)
    _raise_if_failed(tokenizer)
    with phase("register operators"):
        register_all()
    with phase("plan memory") as work:
        memory = plan_memory(plan, config, *device_memory(device))
        work.note = str(memory)
    for line in memory.lines():
        logger.info(line)

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        with phase("load weights", unit="tensors") as work:
            for item in parameters():
                _raise_if_failed(tokenizer)
                work.advance()
                yield item

    is_tiered = config.start == "tiered"
    choices = _find_choices(config, folder, store, device)
    runner = ModelRunner(plan, read, constants, device, backend, store, config.deterministic, is_tiered, choices)
    return runner, plan, memory


def _find_choices(
    config: EngineConfig, folder: Path, store: ArtifactStore, device: torch.device
) -> MeasuredChoices | None:
    if config.deterministic or next(store.artifacts(CHOICES), None) is None:
        return None
    with phase("find measured choices") as work:
        choices = load_choices(store, choice_factors(folder_factors(config, folder), config, device))
        work.note = "none for this model and device" if choices is None else f"{len(choices.decode)} step sizes"
    return choices


def find_model(config: EngineConfig) -> Path:
    """The folder of the model that ``config`` names, downloaded if need be."""
    return resolve_model(config.model, config.revision, config.download_dir, config.hf_token)


def _dummy_model(
    config: EngineConfig, folder: Path
) -> tuple[BuildResult, Callable[[], Iterator[tuple[str, torch.Tensor]]]]:
    from graphserve.compiler.capture import register_interfaces
    from graphserve.models.weight_loading import dummy_parameters

    register_interfaces()
    meta, max_model_len = build_meta(config, folder, None)
    built = compile_model(meta, max_model_len, quantization=config.quantization)
    return built, partial(dummy_parameters, meta, config.seed)


def pick_device(config: EngineConfig) -> torch.device:
    """The device that the model runs on.

    Raises:
        ConfigError: ``device="cuda"``, and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("device='cuda', but torch sees no CUDA device: use device='cpu' or install a CUDA torch")
    return torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
