"""``graphserve warmup``: compile ahead and store, or tell what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from graphserve.config import EngineConfig
from graphserve.kernels.cpu import build, compiler, missing_libraries
from graphserve.plan.cache_dir import cache_dir
from graphserve.plan.store import PlanStore
from graphserve.progress import phase
from graphserve.runtime.cpp_backend import lower_to_cpp
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.load import find_model, find_or_compile, key_factors


@dataclass
class WarmupReport:
    """What the store holds for a model.

    Attributes:
        root: the store's folder.
        present, missing: one line an artifact.
    """

    root: Path
    present: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        lines = [f"store {self.root}"]
        lines += [f"  present  {item}" for item in self.present]
        lines += [f"  missing  {item}" for item in self.missing]
        state = "complete: a start compiles nothing" if self.is_complete else f"{len(self.missing)} missing"
        return "\n".join([*lines, state])


def run_warmup(config: EngineConfig, output: Path | None = None, check: bool = False) -> WarmupReport:
    """Store the plan and the compiled kernels of a model.

    Args:
        output: root of the store; the user's cache by default (``GRAPHSERVE_CACHE`` names another one to a start).
        check: compile nothing, only report what is there.

    Raises:
        GraphserveError: the model cannot be served at all.
    """
    root = output if output is not None else cache_dir()
    report = WarmupReport(root)
    folder = find_model(config)
    store = PlanStore(root)
    stored = store.load(key_factors(config, folder)) if check else find_or_compile(config, folder, store)
    if stored is None:
        report.missing.append(f"plan for {config.model} (dtype {config.dtype}, max_model_len {config.max_model_len})")
        return report
    if not check and not store.folder(key_factors(config, folder)).is_dir():
        report.missing.append("plan: it depends on the values of this checkpoint's tied weights and is not stored")
    else:
        report.present.append(f"plan of {len(stored.plan.launches)} launches")
    kernel_plan = lower_to_cpp(stored.plan, KVCache(stored.plan, 2, config.block_size, torch.device("meta")))
    kernels = list({k.key: k for k in kernel_plan.kernels.values()}.values())
    if not check and compiler() is not None:
        with phase("compile C++ kernels") as work:
            build(kernels, root / "cpp", lambda done, total, name: work.advance())
    missing = missing_libraries(kernels, root / "cpp")
    report.missing += [f"C++ kernels {name}" for name in missing]
    report.present.append(f"{len(kernels)} C++ kernels, block size {config.block_size}" if not missing else "")
    report.present = [item for item in report.present if item]
    return report
