"""A warm start in a bare process: no compiler, no home, a read-only store, imports that would compile are blocked."""

from __future__ import annotations

import getpass
import json
import os
import tempfile
from pathlib import Path

import pytest
import zstandard

from graphserve.artifacts import ArtifactStore
from graphserve.artifacts.bundle import import_bundle
from graphserve.cli.main import main
from graphserve.kernels.cpu import compiler
from tests.bare_start import (
    OTHER_UID,
    as_other_user,
    bare_start,
    contents,
    demo_bundle,
    freeze,
    usual_answer,
    without_privilege,
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_bundle(tmp_path_factory.mktemp("made here"), tmp_path_factory.mktemp("bundle") / "demo.tar.zst", "cpu")


@pytest.fixture(scope="module")
def expected() -> str:
    return usual_answer("cpu")


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


def test_a_bundle_serves_another_user_in_another_folder_and_home(bundle: Path, expected: str) -> None:
    prefix = as_other_user()
    with tempfile.TemporaryDirectory(prefix="graphserve-home-") as folder:  # the other user may not enter tmp_path
        home = Path(folder)
        os.chown(home, OTHER_UID, OTHER_UID)
        result = bare_start(home, "--compile-cache", str(bundle), "--strict-compile-cache", prefix=prefix, cwd=home)
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected + "\n"
        owners = {path.stat().st_uid for path in (home / ".cache" / "graphserve").rglob("manifest.json")}
        assert owners == {OTHER_UID}, "the bundle was not unpacked by the other user"


def test_a_bundle_names_neither_the_place_nor_the_user_that_made_it(bundle: Path, tmp_path: Path) -> None:
    text = zstandard.ZstdDecompressor().stream_reader(bundle.read_bytes()).read()
    names = ["made here", str(tmp_path.parent), os.path.expanduser("~") + "/", f"/{getpass.getuser()}/", os.getcwd()]
    assert [name for name in names if name.encode() in text] == []


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
    assert factors["cpp"] >= {"isa", "flags", "source", "OpenMP runtime", "machine", "system", "C++ compiler"}
    assert "checkpoint layout" in factors["weights"]
