"""A warm start in a bare process: no compiler, no home, a read-only store, imports that would compile are blocked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from graphserve.artifacts import ArtifactStore
from graphserve.artifacts.bundle import import_bundle
from graphserve.cli.main import main
from graphserve.compiler.warmup import run_warmup
from graphserve.config import EngineConfig
from graphserve.kernels.cpu import compiler
from graphserve.llm import LLM
from graphserve.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

PROMPT = "Once upon a time"

# Runs the command line with an importer in front that refuses what a warm start must not need.
_BLOCKED = """
import sys
class Blocker:
    names = ("torch._dynamo", "torch._inductor", "transformers", "triton", "sentencepiece")
    def find_spec(self, name, path=None, target=None):
        if name in self.names or name.startswith(tuple(n + "." for n in self.names)):
            raise ImportError(f"a warm start imported {name}")
sys.meta_path.insert(0, Blocker())
from graphserve.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in one folder and carried away in a file."""
    folder = tmp_path_factory.mktemp("made here")
    path = tmp_path_factory.mktemp("bundle") / "demo.tar.zst"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHSERVE_CACHE", str(folder / "store"))
        assert run_warmup(EngineConfig(), path).is_complete
    shutil.rmtree(folder)
    return path


@pytest.fixture(scope="module")
def expected() -> str:
    """What the demo model says, by a usual start."""
    with LLM() as llm:
        params = SamplingParams(temperature=0, max_tokens=12)
        return llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].text


def without_privilege() -> list[str]:
    """Root may write anything, unless it gives that capability up."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write a read-only store, and setpriv is not here to take that right away")
    return [str(shutil.which("setpriv")), "--bounding-set=-dac_override", "--inh-caps=-dac_override"]


def bare_start(home: Path, *options: str, prefix: Sequence[str] = (), **extra: str) -> subprocess.CompletedProcess[str]:
    """``graphserve generate`` with an empty PATH and HOME."""
    environment = {"HOME": str(home), "PATH": "/nowhere", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}
    command = [*prefix, sys.executable, "-c", _BLOCKED, "generate", "--prompt", PROMPT, "--max-tokens", "12", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def freeze(folder: Path) -> Path:
    """Take every right to write."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_bundle_serves_in_a_bare_process_and_nothing_is_compiled(bundle: Path, expected: str, tmp_path: Path) -> None:
    result = bare_start(tmp_path, "--compile-cache", str(bundle), "--strict-compile-cache")
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected + "\n" and "found" in result.stderr


def test_a_read_only_store_serves_and_is_not_changed(bundle: Path, expected: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    import_bundle(bundle, ArtifactStore(store))
    before = contents(freeze(store))
    options = ("--compile-cache", str(store), "--strict-compile-cache")
    result = bare_start(tmp_path / "nowhere", *options, prefix=without_privilege())
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected + "\n" and contents(store) == before


def test_the_blocker_blocks_and_a_strict_start_says_what_is_missing(bundle: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    strict = bare_start(tmp_path, "--compile-cache", str(empty), "--strict-compile-cache")
    assert strict.returncode == 1 and "the plan of demo is not in the store" in strict.stderr
    assert "graphserve warmup" in strict.stderr
    lax = bare_start(tmp_path, "--compile-cache", str(empty))
    assert lax.returncode == 1 and "a warm start imported transformers" in lax.stderr


def test_a_miss_names_the_factor(bundle: Path, tmp_path: Path) -> None:
    result = bare_start(tmp_path, "--compile-cache", str(bundle), "--dtype", "float32", GRAPHSERVE_CACHE=str(tmp_path))
    assert "miss: dtype auto → float32" in result.stderr


def test_without_a_compiler_a_missing_library_costs_speed_and_not_the_start(
    bundle: Path, expected: str, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path / "store")
    import_bundle(bundle, store)
    next(store.artifacts("cpp")).folder.rename(tmp_path / "away")
    result = bare_start(tmp_path, "--compile-cache", str(store.root), "--dtype", "auto")
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected + "\n" and "plain torch runs instead" in result.stderr


def test_the_manifest_of_a_bundle_names_every_factor(bundle: Path, tmp_path: Path) -> None:
    assert main(["cache", "import", str(bundle), "--store", str(tmp_path)]) == 0
    factors: dict[str, set[str]] = {}
    for path in tmp_path.rglob("manifest.json"):
        factors.setdefault(path.parent.parent.name, set()).update(json.loads(path.read_text())["factors"])
    assert factors["plan"] >= {"config", "dtype", "quantization", "graphserve sources", "torch", "transformers"}
    assert factors["cpp"] >= {"isa", "flags", "source", "OpenMP runtime"} and "checkpoint layout" in factors["weights"]
