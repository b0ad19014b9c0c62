"""Starts of ``graphserve generate`` in a bare process: no compiler, no home, imports that would compile are blocked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from graphserve.compiler.warmup import run_warmup
from graphserve.config import EngineConfig
from graphserve.llm import LLM
from graphserve.sampling_params import SamplingParams

PROMPT = "Once upon a time"
NUM_TOKENS = 12
OTHER_UID = 65534  # nobody

# Runs the command line with an importer in front that refuses what a warm start must not need. To look for it is no
# import: torch asks for triton's spec when it first uses CUDA.
_BLOCKED = """
import sys
from importlib.machinery import ModuleSpec
class Blocker:
    names = ("torch._dynamo", "torch._inductor", "transformers", "triton", "sentencepiece")
    def find_spec(self, name, path=None, target=None):
        if name in self.names or name.startswith(tuple(n + "." for n in self.names)):
            return ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError(f"a warm start imported {spec.name}")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Blocker())
from graphserve.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def demo_bundle(made_in: Path, bundle: Path, *targets: str) -> Path:
    """Everything that a start of the demo model needs, built in one folder, which is deleted, and carried away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHSERVE_CACHE", str(made_in / "store"))
        assert run_warmup(EngineConfig(), bundle, targets).is_complete
    shutil.rmtree(made_in)
    return bundle


def usual_answer(device: str) -> str:
    """What the demo model says, by a usual start in this process."""
    with LLM(device=device, gpu_memory_utilization=0.1) as llm:  # others test on the GPU meanwhile
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
        return llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].text


def without_privilege() -> list[str]:
    """Root may write anything, unless it gives that capability up."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write a read-only store, and setpriv is not here to take that right away")
    return [str(shutil.which("setpriv")), "--bounding-set=-dac_override", "--inh-caps=-dac_override"]


def as_other_user() -> list[str]:
    """A command prefix: another user, who may read what root may (the interpreter can lie in root's home)."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root, with setpriv, can become another user")
    ids = [f"--reuid={OTHER_UID}", f"--regid={OTHER_UID}", "--clear-groups"]
    rights = [f"--{which}-caps=-all,+dac_read_search" for which in ("inh", "ambient")]
    return [str(shutil.which("setpriv")), *ids, *rights, "--bounding-set=-all,+dac_read_search"]


def bare_start(
    home: Path, *options: str, prefix: Sequence[str] = (), cwd: Path | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """``graphserve generate`` of the demo model with an empty PATH and HOME."""
    environment = {"HOME": str(home), "PATH": "/nowhere", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}
    # In some containers only these say where the GPU's driver and the packages are.
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONPATH") if name in os.environ}
    generate = ["generate", "--prompt", PROMPT, "--max-tokens", str(NUM_TOKENS), *options]
    command = [*prefix, sys.executable, "-c", _BLOCKED, *generate]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)


def freeze(folder: Path) -> Path:
    """Take every right to write."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
