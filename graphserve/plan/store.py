"""Compiled plans on disk: one folder a key, found again only when every factor of the key is the same.

    <root>/plans/<key>/plan.json             the launch plan
                      weights.json          how checkpoint tensors become parameters
                      constants.safetensors values of the plan's constant weights
                      manifest.json         the key's factors and a SHA-256 of each file

No path, user, host or time is part of a key, so a folder may be copied elsewhere. An entry is written under a temporary
name and renamed into place, so a reader sees all of it or nothing; an entry that fails its checksums is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from graphserve.plan.schema import PLAN_VERSION, Plan

if TYPE_CHECKING:
    import torch

    from graphserve.models.weight_program import WeightProgram

logger = logging.getLogger(__name__)

_FILES = ("plan.json", "weights.json", "constants.safetensors")


@dataclass(frozen=True)
class StoredPlan:
    """What a start needs instead of a compilation."""

    plan: Plan
    weight_program: WeightProgram
    constants: dict[str, torch.Tensor]


def plan_key(factors: dict[str, Any]) -> str:
    """The folder name for a set of factors."""
    return hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()[:32]


def source_hash() -> str:
    """SHA-256 over the sources that decide what a plan says: compiler, passes, ops, plan format, weight program."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(str(PLAN_VERSION).encode())
    for folder in ("compiler", "passes", "kernels", "plan", "models"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class PlanStore:
    """Plans under one root folder. Every method may be called from several processes at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root / "plans"

    def folder(self, factors: dict[str, Any]) -> Path:
        """Where the plan for ``factors`` is or would be."""
        return self._root / plan_key(factors)

    def load(self, factors: dict[str, Any]) -> StoredPlan | None:
        """The stored plan, or None if there is none or it is damaged (said in the log)."""
        from graphserve.models.weight_program import WeightProgram

        folder = self.folder(factors)
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            contents = {name: (folder / name).read_bytes() for name in _FILES}
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("stored plan %s cannot be read and is made again: %s", folder.name, error)
            return None
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != manifest.get("sha256", {}).get(name):
                logger.warning("stored plan %s is damaged (%s fails its checksum) and is made again", folder.name, name)
                return None
        return StoredPlan(
            msgspec.json.decode(contents["plan.json"], type=Plan),
            msgspec.json.decode(contents["weights.json"], type=WeightProgram),
            load_tensors(contents["constants.safetensors"]),
        )

    def save(self, factors: dict[str, Any], stored: StoredPlan) -> Path | None:
        """Write a plan; returns its folder, or None if the disk refused it (said in the log)."""
        folder = self.folder(factors)
        contents = {
            "plan.json": msgspec.json.format(msgspec.json.encode(stored.plan), indent=1),
            "weights.json": msgspec.json.encode(stored.weight_program),
            "constants.safetensors": save_tensors(stored.constants),
        }
        manifest = {"factors": factors, "sha256": {n: hashlib.sha256(d).hexdigest() for n, d in contents.items()}}
        contents["manifest.json"] = json.dumps(manifest, indent=1, sort_keys=True).encode()
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=self._root, prefix="."))
            try:
                for name, data in contents.items():
                    (temporary / name).write_bytes(data)
                temporary.chmod(0o755)
                if folder.exists():  # damaged, or another process was quicker: ours is as good
                    shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            if folder.is_dir():
                return folder  # another process renamed its own first
            logger.warning("the compiled plan could not be stored in %s: %s", self._root, error)
            return None
        return folder
