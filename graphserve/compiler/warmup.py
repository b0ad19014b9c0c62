"""``graphserve warmup``: compile ahead and store, or tell what is missing. Needs no weights and no GPU."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from graphserve.artifacts import Artifact, ArtifactStore, open_store
from graphserve.artifacts.bundle import SUFFIX, export_bundle, import_bundle
from graphserve.artifacts.cache_dir import cache_dir
from graphserve.artifacts.eviction import keep_below_limit, limit_bytes
from graphserve.compiler.warmup_kernels import cpp_kernels, triton_kernels
from graphserve.compiler.warmup_report import WarmupReport
from graphserve.config import EngineConfig
from graphserve.errors import ConfigError
from graphserve.kernels.cpu import CppKernel, compile_missing, compiler, stored_libraries
from graphserve.kernels.cpu.isa import ISA_LEVELS, check_compilable, isa_level
from graphserve.kernels.triton.compile_jobs import compile_in_processes, default_jobs
from graphserve.kernels.triton.compiled import TRITON_VERSION, find_compiled, installed_version
from graphserve.kernels.triton.kernel import TARGETS as GPU_TARGETS
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.models.checkpoint import Checkpoint
from graphserve.models.converted_tokenizer import conversion_factors
from graphserve.models.hub import resolve_model
from graphserve.models.tokenizer import convertible_files, load_tokenizer
from graphserve.plan.store import load_plan, load_weight_programs
from graphserve.progress import phase
from graphserve.runtime.choices import KIND as CHOICES
from graphserve.runtime.choices import MeasuredChoices, choice_factors, load_choices, save_choices
from graphserve.runtime.find_plan import (
    ModelPlan,
    find_or_compile,
    find_or_compile_config,
    folder_factors,
    known_program,
    layout_of,
    plan_factors,
    weight_factors,
)
from graphserve.runtime.load import find_model, pick_device
from graphserve.runtime.triton_backend import target_of

# Loads the model of a config and times its steps.
Measure = Callable[[EngineConfig], MeasuredChoices]


def run_warmup(
    config: EngineConfig,
    output: Path | None = None,
    targets: Sequence[str] = ("cpu",),
    check: bool = False,
    num_jobs: int | None = None,
    measure: Measure | None = None,
) -> WarmupReport:
    """Store the plan, the weight program and the kernels of a model for some targets.

    Args:
        output: a folder or ``.tar.zst`` file; the user's cache by default.
        targets: ``cpu`` (this processor's ISA level), ``cpu:LEVEL``, or a GPU target such as ``cuda:90``.
        check: compile nothing, only report what is there.
        num_jobs: compilers that run at a time, by default one a processor.
        measure: times how decode steps run fastest on the device at hand; what it finds is stored too.

    Raises:
        ConfigError: a target is unknown, or ``output`` keeps nothing; or ``measure`` where ``targets`` lack the device
            at hand, or with ``deterministic``, which leaves nothing to choose.
        GraphserveError: the model cannot be served at all.
    """
    for target in targets:
        check_target(target)
    if measure is not None:
        _check_measure(config, targets)
    if not check:
        _check_output(output)
    num_jobs = default_jobs() if num_jobs is None else num_jobs
    folder = find_model(config)
    with _store_of(output, check) as store:
        report = WarmupReport(str(output) if output is not None else str(store.root))
        _tokenizer(config, folder, store, check, report)
        model = _plan(config, folder, store, check, report)
        if model is not None:
            for target in targets:
                if target.startswith("cpu"):
                    level = target.partition(":")[2] or isa_level()
                    _cpp(cpp_kernels(model.compiled.plan, config, level), level, store, check, num_jobs, report)
                else:
                    kernels = triton_kernels(model.compiled.plan, config, target)
                    _triton(kernels, target, store, check, num_jobs, report)
        else:
            report.add("kernels", "kernels: which ones follows from the plan", None, False)
        if measure is not None:
            _choices(config, folder, store, check, measure, report)
        if not check:
            if output is not None and _is_bundle(output):
                with phase("write bundle"):
                    export_bundle(report.artifacts.values(), output)
            keep_below_limit(store, {artifact.folder for artifact in report.artifacts.values()})
    return report


def check_target(target: str) -> None:
    """Refuse an unknown target.

    Raises:
        ConfigError: with the targets that are known; or it is an ISA level of another kind of machine.
    """
    known = ["cpu", *(f"cpu:{level}" for level in ISA_LEVELS), *GPU_TARGETS]
    if target not in known:
        raise ConfigError(f"target {target!r} is unknown: use one of {', '.join(known)}")
    if target.startswith("cpu:"):
        check_compilable(target.removeprefix("cpu:"))


def _check_measure(config: EngineConfig, targets: Sequence[str]) -> None:
    if config.deterministic:
        raise ConfigError("measure with deterministic=True: a fixed order of every sum leaves nothing to choose")
    device = pick_device(config)
    here = "cpu" if device.type == "cpu" else target_of(torch.cuda.get_device_capability(device))
    if not any(target == here or target.startswith(f"{here}:") for target in targets):
        raise ConfigError(
            f"measure times the device at hand, {here}, which is not among the targets {', '.join(targets)}: add it to "
            "them, choose another with device, or measure on a machine that has the target"
        )


def _is_bundle(output: Path) -> bool:
    return output.name.endswith(SUFFIX)


def _check_output(output: Path | None) -> None:
    """Refuse early what could only be refused once everything is compiled."""
    limit_bytes()
    if output is None:
        open_store().require_writable()
    elif not _is_bundle(output):
        ArtifactStore(output).require_writable()
    elif output.is_dir():
        raise ConfigError(f"{output} is a folder, and a bundle is a file: name another, or a folder without {SUFFIX}")
    else:
        ArtifactStore(output.parent).require_writable()


@contextlib.contextmanager
def _store_of(output: Path | None, check: bool) -> Iterator[ArtifactStore]:
    """The store to fill or to look at: for a bundle the user's cache, or a folder that holds what is in it already."""
    cache = ArtifactStore(cache_dir(), must_keep=True)
    if output is None or (_is_bundle(output) and not check and cache.is_writable):
        yield cache
    elif not _is_bundle(output):
        yield ArtifactStore(output, must_keep=True)
    else:
        with tempfile.TemporaryDirectory(prefix="graphserve-bundle-") as folder:
            store = ArtifactStore(Path(folder), must_keep=True)
            if output.is_file():
                import_bundle(output, store)
            yield store


def _tokenizer(config: EngineConfig, folder: Path, store: ArtifactStore, check: bool, report: WarmupReport) -> None:
    """Convert the tokenizer, if it is in a form that only transformers reads."""
    if config.tokenizer is not None:
        folder = resolve_model(config.tokenizer, None, config.download_dir, config.hf_token)
    if not convertible_files(folder):
        return
    factors = conversion_factors(folder)
    was_there = store.find("tokenizer", factors) is not None
    if not was_there and not check:
        with phase("convert tokenizer"):
            load_tokenizer(folder, store=store)
    report.add("tokenizer", f"converted tokenizer of {config.model}", store.find("tokenizer", factors), was_there)


def _plan(
    config: EngineConfig, folder: Path, store: ArtifactStore, check: bool, report: WarmupReport
) -> ModelPlan | None:
    checkpoint = _checkpoint(folder)
    factors: Mapping[str, Any] = plan_factors(config, folder, checkpoint)
    if checkpoint is not None:
        factors, _ = known_program(store, factors, folder, checkpoint)
    plan_before = store.find("plan", factors)
    programs_before = _programs(store, factors, checkpoint)
    found: ModelPlan | None
    if check:
        compiled = load_plan(store, factors)
        found = ModelPlan(compiled, factors, None) if compiled is not None else None
    else:
        find = find_or_compile if checkpoint is not None else find_or_compile_config
        found = find(config, folder, store)
        factors = found.factors
    dtype = factors["dtype"]
    if checkpoint is None and config.dtype == "auto" and dtype != "auto":
        dtype += ": config.json names none, and weights in another need --dtype"
    name = f"{config.model} (dtype {dtype}, max_model_len {config.max_model_len})"
    launches = f", {len(found.compiled.plan.launches)} launches" if found is not None else ""
    plan = store.find("plan", factors)
    # By the key: what a checkpoint unties, and so which plan it needs, may have come out just now.
    had_plan = plan is not None and plan_before is not None and plan.manifest.key == plan_before.manifest.key
    report.add("plan", f"plan of {name}{launches}", plan, had_plan)
    for what, programs in _programs(store, factors, checkpoint).items():
        report.add("weights", f"{what} of {name}", programs, programs_before.get(what) is not None)
    return found


def _programs(
    store: ArtifactStore, factors: Mapping[str, Any], checkpoint: Checkpoint | None
) -> dict[str, Artifact | None]:
    """The weight programs that a config foresees, and that of a checkpoint that has another layout."""
    foreseen = load_weight_programs(store, weight_factors(factors))
    found = {"weight programs": store.find("weights", weight_factors(factors))}
    if checkpoint is not None and foreseen is not None and layout_of(checkpoint) not in foreseen:
        own = weight_factors(factors, layout_of(checkpoint))
        found["weight program for the checkpoint's own layout"] = store.find("weights", own)
    return found


def _checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint's headers, or None for a folder with a config only."""
    try:
        return Checkpoint.open(folder)
    except ConfigError:
        return None


def _cpp(
    kernels: list[CppKernel], level: str, store: ArtifactStore, check: bool, num_jobs: int, report: WarmupReport
) -> None:
    before = stored_libraries(kernels, store)
    missing = [name for name, found in before.items() if isinstance(found, str)]
    can_build = not check and compiler() is not None
    if missing and can_build:
        with phase(f"compile C++ kernels for {level}", total=len(before), unit="libraries") as work:
            compile_missing(kernels, store, lambda done, total, name: work.advance(), num_jobs)
    for name, found in (stored_libraries(kernels, store) if missing else before).items():
        if isinstance(found, str):
            why = found if can_build or check else f"{found}, and no C++ compiler was found"
            report.add(f"cpu:{level}", f"C++ library {name}: {why}", None, False)
        else:
            report.add(f"cpu:{level}", f"C++ library {name}", found, name not in missing)


def _triton(
    kernels: list[TritonKernel], target: str, store: ArtifactStore, check: bool, num_jobs: int, report: WarmupReport
) -> None:
    before = {kernel.key: find_compiled(store, kernel, target) for kernel in kernels}
    stale = [kernel for kernel in kernels if _must_compile(before[kernel.key], check)]
    if stale and not check:
        with phase(f"compile Triton kernels for {target}", total=len(stale), unit="kernels") as work:
            compile_in_processes(stale, target, store, num_jobs, work.advance)
    made_now = {kernel.key for kernel in stale}
    for kernel in kernels:
        artifact = find_compiled(store, kernel, target)
        report.add(target, f"Triton kernel {kernel.symbol}", artifact, kernel.key not in made_now)


def _choices(
    config: EngineConfig, folder: Path, store: ArtifactStore, check: bool, measure: Measure, report: WarmupReport
) -> None:
    factors = choice_factors(folder_factors(config, folder), config, pick_device(config))
    stored = load_choices(store, factors)
    before = artifact = store.find(CHOICES, factors) if stored and stored.covers(config.max_num_seqs) else None
    if artifact is None and not check:
        begin = time.monotonic()
        changes: dict[str, Any] = {"compile_cache": str(store.root) if store.root.is_dir() else None}
        if _checkpoint(folder) is None:
            changes["load_format"] = "dummy"
        choices = measure(msgspec.structs.replace(config, **changes))
        artifact = save_choices(store, factors, choices, {"seconds": round(time.monotonic() - begin, 3)})
    report.add("choices", f"measured choices for {factors['device']}", artifact, before is not None)


def _must_compile(artifact: Artifact | None, check: bool) -> bool:
    """Whether a kernel is missing, or was compiled by another Triton than the one at hand (a start takes it still)."""
    if artifact is None or check:
        return artifact is None
    at_hand = installed_version()
    return at_hand is not None and artifact.manifest.built.get(TRITON_VERSION) != at_hand
