"""Kernels that one set of torch, transformers and triton built serve under another one.

Needs a second interpreter with graphserve's dependencies in other versions: ``GRAPHSERVE_OTHER_PYTHON`` names it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.full

TARGET = "cuda:90"


@pytest.fixture(scope="module")
def other_python() -> str:
    named = os.environ.get("GRAPHSERVE_OTHER_PYTHON")
    if not named:
        pytest.skip("GRAPHSERVE_OTHER_PYTHON names no interpreter with another triton")
    return named


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([python, *arguments], env=environment, capture_output=True, text=True)


def kernels(python: str, action: str, bundle: Path, store: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("kernels_of_demo.py")
    result = run(python, str(script), action, str(bundle), TARGET, str(store))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("direction", ["built here, loaded there", "built there, loaded here"])
def test_kernels_of_one_triton_serve_under_another(direction: str, other_python: str, tmp_path: Path) -> None:
    pythons = [sys.executable, other_python]
    maker, user = pythons if direction.startswith("built here") else reversed(pythons)
    bundle = tmp_path / "kernels.tar.zst"
    made = kernels(maker, "build", bundle, tmp_path / "made")
    used = kernels(user, "load", bundle, tmp_path / "used")
    assert made["versions"]["triton"] != used["versions"]["triton"], "both interpreters have the same triton"
    assert used["made_by"] == [made["versions"]["triton"]]
    assert used["kernels"] == made["kernels"] > 0 and min(used["parameters"]) > 0


def test_diff_names_the_versions_that_keep_a_plan_from_serving(other_python: str, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    made = run(sys.executable, "-m", "graphserve", "warmup", "demo", "--output", store)
    assert made.returncode == 0, made.stderr
    assert run(sys.executable, "-m", "graphserve", "cache", "diff", store).returncode == 0
    found = run(other_python, "-m", "graphserve", "cache", "diff", store)
    assert found.returncode == 1
    plan = next(line for line in found.stdout.splitlines() if line.startswith("plan"))
    assert "transformers" in plan and "→" in plan and "triton" not in found.stdout
