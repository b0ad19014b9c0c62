"""A pass and a kernel from another distribution, found by entry point, used from end to end."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphserve import plugins
from graphserve.errors import ConfigError
from graphserve.passes.base import Pass

PASS_SOURCE = '''
"""relu(x) * relu(x) after the gate  →  outside.square_relu"""
import torch
from graphserve.passes.base import Match, Pass
from graphserve.passes.match import is_gs

def pattern(node):
    return Match(node, (node,)) if is_gs(node, "act_mul") and node.args[2] == "silu" else None

def replacement(match, ctx):
    return {match.root: ctx.emit(torch.ops.gs.outside_silu_mul.default, *match.root.args[:2])}

PASS = Pass("outside_silu_mul", replacement, pattern=pattern)
'''
KERNEL_SOURCE = """
import torch.nn.functional as F
from graphserve.kernels.registry import register as register_op

def register():
    register_op(
        "outside_silu_mul(Tensor gate, Tensor up) -> Tensor",
        lambda gate, up: F.silu(gate) * up,
        lambda gate, up: gate.new_empty(gate.shape),
    )
"""
ENTRY_POINTS = """
[graphserve.passes]
outside_silu_mul = outside_package.silu_pass:PASS
[graphserve.kernels]
outside_silu_mul = outside_package.silu_kernel:register
"""
PROGRAM = """
import json
from graphserve import LLM, SamplingParams
from graphserve.compiler.explain import run_explain
report = json.loads(run_explain("demo", json=True))
with LLM(dtype="float32") as llm:
    out = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
print(json.dumps({"passes": {p["name"]: p["matches"] for p in report["passes"]},
                  "launches": report["launches"], "tokens": list(out[0].outputs[0].token_ids)}))
"""


def write_distribution(folder: Path, entry_points: str = ENTRY_POINTS) -> None:
    package = folder / "outside_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "silu_pass.py").write_text(PASS_SOURCE)
    (package / "silu_kernel.py").write_text(KERNEL_SOURCE)
    info = folder / "outside_package-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-package\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(entry_points)


def run_program(extra_path: Path | None, cache: Path, repository: Path) -> dict[str, object]:
    path = [str(repository), *([str(extra_path)] if extra_path is not None else [])]
    environment = {"PYTHONPATH": ":".join(path), "GRAPHSERVE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(autouse=True)
def _forget_the_package() -> Iterator[None]:
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "outside_package"]:
        del sys.modules[name]


def test_a_pass_and_a_kernel_of_another_distribution_run_and_change_no_token(tmp_path: Path, repository: Path) -> None:
    write_distribution(tmp_path / "site")
    without = run_program(None, tmp_path / "cache", repository)
    with_it = run_program(tmp_path / "site", tmp_path / "cache", repository)
    assert with_it["tokens"] == without["tokens"]
    assert "outside_silu_mul" not in without["passes"]
    assert with_it["passes"]["outside_silu_mul"] > 0
    assert "reference gs.outside_silu_mul.default" in with_it["launches"]


def test_an_entry_point_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "[graphserve.passes]\nlost = outside_package.nowhere:PASS\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"entry point lost .* of outside-package 1\.2 cannot be imported"):
        plugins.load(plugins.PASSES, Pass)


def test_an_entry_point_of_the_wrong_kind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "[graphserve.passes]\nodd = outside_package.silu_kernel:KERNEL_NAME\n")
    (tmp_path / "outside_package" / "silu_kernel.py").write_text("KERNEL_NAME = 'x'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="is a str, graphserve.passes wants a Pass"):
        plugins.load(plugins.PASSES, Pass)


def test_installed_plugins_are_factors_of_a_plans_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "graphserve.passes:outside_silu_mul=outside-package 1.2" in plugins.versions()
