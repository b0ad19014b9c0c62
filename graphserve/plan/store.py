"""Plans and weight programs as artifacts: what a start needs instead of a compilation.

    plan     plan.json              the launch plan
             constants.safetensors  values of the plan's constant weights
    weights  weights.json           how checkpoint tensors become parameters, by the layout of the checkpoint

Both are readable. A plan follows from ``config.json``; a weight program also from the layout, which is the names and
shapes of the checkpoint's tensors. Those for the layouts that a config lets expect are one artifact, stored with the
plan; that for any other layout is one of its own.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from graphserve.artifacts.manifest import SECONDS
from graphserve.artifacts.store import Artifact, ArtifactStore
from graphserve.plan.schema import Plan

if TYPE_CHECKING:
    import torch

    from graphserve.models.weight_program import WeightProgram

logger = logging.getLogger(__name__)

PLAN_FILE, CONSTANTS_FILE, WEIGHTS_FILE = "plan.json", "constants.safetensors", "weights.json"

# Sources that decide what a plan says; those of the kernels themselves have keys of their own.
_SOURCE_FOLDERS = ("compiler", "passes", "kernels", "plan", "models")


@dataclass(frozen=True)
class CompiledPlan:
    """A plan and the values of its constant weights (CPU tensors by name)."""

    plan: Plan
    constants: dict[str, torch.Tensor]


@cache
def source_hash() -> str:
    """SHA-256 over the sources that decide what a plan says: compiler, passes, ops, plan format, weight program."""
    return hash_sources(*(f"{folder}/*.py" for folder in _SOURCE_FOLDERS))


def hash_sources(*patterns: str) -> str:
    """SHA-256 over the names and contents of the package's files that match a glob pattern, bytecode left out."""
    package = Path(__file__).resolve().parent.parent
    paths = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.suffix != ".pyc"):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load_plan(store: ArtifactStore, factors: Mapping[str, Any]) -> CompiledPlan | None:
    """The stored plan for ``factors``, or None."""
    from safetensors.torch import load

    artifact = store.find("plan", factors)
    if artifact is None:
        return None
    plan = msgspec.json.decode(artifact.read(PLAN_FILE), type=Plan)
    return CompiledPlan(plan, load(artifact.read(CONSTANTS_FILE)))


def save_plan(
    store: ArtifactStore,
    factors: Mapping[str, Any],
    compiled: CompiledPlan,
    seconds: float = 0.0,
) -> Artifact | None:
    """Store a plan; None if nothing could be written (said in the log).

    Args:
        seconds: what making it took.
    """
    from safetensors.torch import save

    model = compiled.plan.model
    files = {
        PLAN_FILE: msgspec.json.format(msgspec.json.encode(compiled.plan), indent=1),
        CONSTANTS_FILE: save(compiled.constants),
    }
    label = f"{model.get('architecture', 'model')}, {model.get('num_layers', '?')} layers, {model.get('dtype', '?')}"
    return _put(store, "plan", factors, files, label, {SECONDS: round(seconds, 3)})


def load_weight_programs(store: ArtifactStore, factors: Mapping[str, Any]) -> dict[str, WeightProgram] | None:
    """The stored weight programs for ``factors`` by layout digest, or None."""
    from graphserve.models.weight_program import WeightProgram

    artifact = store.find("weights", factors)
    return None if artifact is None else msgspec.json.decode(artifact.read(WEIGHTS_FILE), type=dict[str, WeightProgram])


def save_weight_programs(
    store: ArtifactStore, factors: Mapping[str, Any], programs: Mapping[str, WeightProgram]
) -> Artifact | None:
    """Store weight programs by layout digest; None if nothing could be written (said in the log)."""
    label = f"weight programs for {len(programs)} checkpoint layout{'s' if len(programs) != 1 else ''}"
    files = {WEIGHTS_FILE: msgspec.json.encode(dict(sorted(programs.items())))}
    return _put(store, "weights", factors, files, label, {SECONDS: 0.0})


def _put(
    store: ArtifactStore,
    kind: str,
    factors: Mapping[str, Any],
    files: dict[str, bytes],
    label: str,
    built: dict[str, Any],
) -> Artifact | None:
    try:
        return store.put(kind, factors, files, label, built)
    except OSError as error:
        logger.warning("%s could not be stored: %s", label, error)
        return None
