"""A warm start on the device in a bare process: what ``tests/runtime/test_warm_start.py`` shows of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


@pytest.fixture(scope="module")
def bundle(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built for the device's target."""
    import torch

    from graphserve.runtime.triton_backend import target_of
    from tests.bare_start import demo_bundle

    target = target_of(torch.cuda.get_device_capability(device))
    return demo_bundle(tmp_path_factory.mktemp("made here"), tmp_path_factory.mktemp("bundle") / "demo.tar.zst", target)


def test_a_read_only_store_serves_without_compiler_and_home(bundle: Path, tmp_path: Path) -> None:
    from graphserve.artifacts import ArtifactStore
    from graphserve.artifacts.bundle import import_bundle
    from tests.bare_start import bare_start, contents, freeze, usual_answer, without_privilege

    store = tmp_path / "store"
    import_bundle(bundle, ArtifactStore(store))
    before = contents(freeze(store))
    options = ("--device", "cuda", "--compile-cache", str(store), "--strict-compile-cache")
    options += ("--gpu-memory-utilization", "0.1")
    result = bare_start(tmp_path / "nowhere", *options, prefix=without_privilege())
    assert result.returncode == 0, result.stderr
    assert result.stdout == usual_answer("cuda") + "\n" and contents(store) == before
