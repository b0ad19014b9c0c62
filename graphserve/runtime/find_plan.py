"""The plan and the weight program of a model: from the store, or compiled now and stored."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graphserve import plugins
from graphserve.artifacts import ArtifactStore
from graphserve.artifacts.difference import explain_miss
from graphserve.config import EngineConfig
from graphserve.errors import ConfigError
from graphserve.models.checkpoint import FLOAT_DTYPES, Checkpoint
from graphserve.models.config import DTYPE_NAMES, read_config_json
from graphserve.models.weight_loading import different_ties, warn_untied
from graphserve.plan.store import (
    CompiledPlan,
    load_plan,
    load_weight_programs,
    save_plan,
    save_weight_programs,
    source_hash,
)
from graphserve.progress import phase

if TYPE_CHECKING:
    import torch

    from graphserve.compiler.build import BuildResult
    from graphserve.models.weight_program import Shape, WeightProgram

logger = logging.getLogger(__name__)

FORESEEN = "foreseen from config.json"  # as a layout: all those for which foreseen_programs has a program


@dataclass(frozen=True)
class ModelPlan:
    """What a start needs besides the weights.

    Attributes:
        factors: what the store knows the plan by.
        weight_program: None where no checkpoint was at hand.
    """

    compiled: CompiledPlan
    factors: Mapping[str, Any]
    weight_program: WeightProgram | None


def plan_factors(config: EngineConfig, folder: Path, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Everything a stored plan depends on: no weights, and nothing of the device, the pool or the step sizes.

    ``untied`` is empty here; :func:`known_program` finds the names that a checkpoint unties.
    """
    model_config = read_config_json(folder)
    dtype = DTYPE_NAMES.get(config.dtype, config.dtype)
    return {
        "config": _digest(model_config),
        "dtype": _undeclared_dtype(checkpoint) if dtype == "auto" and not declares_dtype(model_config) else dtype,
        "max_model_len": config.max_model_len,
        "quantization": config.quantization,
        "untied": [],
        "graphserve sources": source_hash(),
        "torch": metadata.version("torch").split("+")[0],
        "transformers": metadata.version("transformers"),
        "plugins": plugins.versions(),
    }


def known_program(
    store: ArtifactStore, factors: Mapping[str, Any], folder: Path, checkpoint: Checkpoint
) -> tuple[Mapping[str, Any], WeightProgram | None]:
    """The stored weight program of a checkpoint and, by it, the factors of the plan with the names that are untied.

    Args:
        factors: those of :func:`plan_factors`, which are returned where no program is stored.
    """
    with phase("find weight program"):
        layout = layout_of(checkpoint)
        program = (load_weight_programs(store, weight_factors(factors)) or {}).get(layout)
        if program is None:
            program = (load_weight_programs(store, weight_factors(factors, layout)) or {}).get(layout)
    if program is None or not program.stored_twice:
        return factors, program
    with phase("compare tied weights"):
        untied = different_ties(program, folder)
    return {**factors, "untied": untied}, program.untied(untied)


def folder_factors(config: EngineConfig, folder: Path) -> dict[str, Any]:
    """What a plan depends on, whether a folder holds a checkpoint or a config only."""
    try:
        checkpoint = Checkpoint.open(folder)
    except ConfigError:
        checkpoint = None
    return plan_factors(config, folder, checkpoint)


def checkpoint_layout(shapes: Mapping[str, Shape]) -> str:
    """A digest of the names and shapes of a checkpoint's tensors."""
    return _digest(sorted((name, list(shape)) for name, shape in shapes.items()))


def weight_factors(plan: Mapping[str, Any], layout: str = FORESEEN) -> dict[str, Any]:
    """Everything stored weight programs depend on: names and shapes of the stored tensors, not their values.

    Args:
        plan: the factors of the model's plan.
        layout: :func:`checkpoint_layout` of the tensors, if it is none of those foreseen.
    """
    names = ("config", "dtype", "graphserve sources", "transformers", "torch")
    return {**{name: plan[name] for name in names}, "checkpoint layout": layout}


def layout_of(checkpoint: Checkpoint) -> str:
    """:func:`checkpoint_layout` of a checkpoint."""
    return checkpoint_layout(_shapes(checkpoint))


def find_or_compile(config: EngineConfig, folder: Path, store: ArtifactStore) -> ModelPlan:
    """The plan of a checkpoint with its weight program, from the store or compiled now (and then stored).

    Raises:
        CacheMissError: it is not stored and the store is strict.
        CheckpointError: the checkpoint does not fit the model, or cannot be read.
    """
    found = _find_or_compile(config, folder, store)
    warn_untied(found.factors["untied"], folder)
    return found


def _find_or_compile(config: EngineConfig, folder: Path, store: ArtifactStore) -> ModelPlan:
    with phase("read checkpoint headers"):
        checkpoint = Checkpoint.open(folder)
        base = plan_factors(config, folder, checkpoint)
    factors, program = known_program(store, base, folder, checkpoint)
    with phase("find stored plan") as work:
        compiled = load_plan(store, factors) if program is not None else None
        missing = None if compiled is not None else _missing(store, factors, config.model)
        work.note = "found" if missing is None else missing.why
    if missing is None:
        assert compiled is not None
        return ModelPlan(compiled, factors, program)
    # Not the factors with what is untied: another process may build the same and not know of that yet.
    with store.lock("plan", base):
        # Another process may have made it while this one waited.
        if program is None:
            factors, program = known_program(store, base, folder, checkpoint)
        compiled = load_plan(store, factors) if program is not None else None
        if compiled is not None:
            return ModelPlan(compiled, factors, program)
        return _compile_checkpoint(config, folder, store, missing)


def find_or_compile_config(config: EngineConfig, folder: Path, store: ArtifactStore) -> ModelPlan:
    """The plan of a model of which only ``config.json`` is at hand, stored with the weight programs to be expected."""
    factors = plan_factors(config, folder, None)
    with phase("find stored plan") as work:
        found = _stored_config(store, factors)
        missing = None if found is not None else _missing(store, factors, config.model)
        work.note = "found" if missing is None else missing.why
    if missing is None:
        assert found is not None
        return found
    with store.lock("plan", factors):
        return _stored_config(store, factors) or _compile_config(config, folder, factors, store, missing)


class _Missing(NamedTuple):
    """What a start has to build, and why."""

    what: str
    why: str


def _missing(store: ArtifactStore, factors: Mapping[str, Any], model: str) -> _Missing:
    if store.find("plan", factors) is not None:
        return _Missing(f"the weight program of {model}", "only the plan is there, or that of another layout")
    return _Missing(f"the plan of {model}", explain_miss(store, "plan", factors, same=("config",)))


def _stored_config(store: ArtifactStore, factors: Mapping[str, Any]) -> ModelPlan | None:
    compiled, programs = load_plan(store, factors), load_weight_programs(store, weight_factors(factors))
    return None if compiled is None or programs is None else ModelPlan(compiled, factors, None)


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


def _compile_checkpoint(config: EngineConfig, folder: Path, store: ArtifactStore, missing: _Missing) -> ModelPlan:
    store.begin_build(*missing)
    _import_transformers()
    with phase("check weights"):
        from graphserve.models.weight_loading import check_checkpoint, foreseen_programs, stored_dtype, untie

        checkpoint = Checkpoint.open(folder)
        meta, max_model_len = build_meta(config, folder, stored_dtype(folder))
        foreseen = foreseen_programs(meta)
        program = check_checkpoint(meta, folder)
        untied = different_ties(program, folder)
        untie(meta, untied)
    factors = {**plan_factors(config, folder, checkpoint), "untied": untied}
    compiled = load_plan(store, factors) or _compile_and_save(meta, max_model_len, config, factors, store)
    _save_programs(store, factors, foreseen, {layout_of(checkpoint): program})
    return ModelPlan(compiled, factors, program.untied(untied))


def _compile_config(
    config: EngineConfig, folder: Path, factors: Mapping[str, Any], store: ArtifactStore, missing: _Missing
) -> ModelPlan:
    store.begin_build(*missing)
    _import_transformers()
    from graphserve.models.weight_loading import foreseen_programs

    meta, max_model_len = build_meta(config, folder, None)
    compiled = load_plan(store, factors) or _compile_and_save(meta, max_model_len, config, factors, store)
    _save_programs(store, factors, foreseen_programs(meta), {})
    return ModelPlan(compiled, factors, None)


def _compile_and_save(
    meta: Any,
    max_model_len: int,
    config: EngineConfig,
    factors: Mapping[str, Any],
    store: ArtifactStore,
) -> CompiledPlan:
    begin = time.monotonic()
    built = compile_model(meta, max_model_len, quantization=config.quantization)
    compiled = CompiledPlan(built.plan, built.constants)
    with phase("store plan"):
        save_plan(store, factors, compiled, time.monotonic() - begin)
    return compiled


def _save_programs(
    store: ArtifactStore,
    factors: Mapping[str, Any],
    foreseen: list[tuple[WeightProgram, dict[str, Shape]]],
    own: dict[str, WeightProgram],
) -> None:
    """Store the programs that are foreseen, and that of the checkpoint at hand if it is none of them."""
    programs = {checkpoint_layout(shapes): program for program, shapes in foreseen}
    if store.find("weights", weight_factors(factors)) is None:
        save_weight_programs(store, weight_factors(factors), programs)
    for layout, program in own.items():
        if layout not in programs:
            save_weight_programs(store, weight_factors(factors, layout), {layout: program})


def _import_transformers() -> None:
    with phase("import transformers"):
        from graphserve.compiler.capture import register_interfaces

        register_interfaces()
        import graphserve.compiler.build  # noqa: F401  (imported here, it is not in the time of what it is needed for)


def _shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    return {name: tuple(entry.shape) for name, entry in checkpoint.tensors.items()}


def declares_dtype(model_config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` names the dtype to compute in, so that no checkpoint is asked."""
    parts = (model_config, model_config.get("text_config") or {})
    return any(part.get("dtype") or part.get("torch_dtype") for part in parts)


def _undeclared_dtype(checkpoint: Checkpoint | None) -> str:
    """What ``resolve_dtype`` makes of ``auto``: the dtype of most stored bytes if kernels have it, else float32."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.tensors.values() if checkpoint is not None else ():
        if entry.dtype in FLOAT_DTYPES:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    stored = max(sizes, key=lambda name: sizes[name], default="F32")
    return {"BF16": "bfloat16", "F16": "float16"}.get(stored, "float32")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
