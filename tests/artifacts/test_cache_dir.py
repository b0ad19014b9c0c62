"""Where the cache is, and what is left of a cache that had nowhere to be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphserve.artifacts.cache_dir import cache_dir, remove_own_folder


def test_the_named_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHSERVE_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b" and cache_dir().is_dir()


@pytest.fixture
def unwritable(tmp_path: Path) -> dict[str, str]:
    """An environment whose cache nobody, not even root, can make, and whose temporary files are in a folder apart."""
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    cache, temporary = tmp_path / "file" / "cache", tmp_path / "temporary"
    return {**os.environ, "GRAPHSERVE_CACHE": str(cache), "TMPDIR": str(temporary)}


def test_what_a_process_kept_for_itself_ends_with_it(tmp_path: Path, unwritable: dict[str, str]) -> None:
    code = (
        "from graphserve.artifacts import open_store\n"
        "from graphserve.artifacts.cache_dir import cache_dir\n"
        "open_store().put('plan', {'config': 'abc'}, {'plan.json': b'{}'}, 'a plan')\n"
        "assert open_store().find('plan', {'config': 'abc'}) is not None\n"
        "print(cache_dir())"
    )
    result = subprocess.run([sys.executable, "-c", code], env=unwritable, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).parent == tmp_path / "temporary"
    assert not list((tmp_path / "temporary").iterdir())


def test_a_command_leaves_nothing_behind_though_it_skips_the_end_of_python(
    tmp_path: Path, unwritable: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "graphserve", "generate", "--prompt", "a", "--strict-compile-cache"]
    result = subprocess.run(command, env=unwritable, capture_output=True, text=True)
    assert result.returncode == 1 and f"is not in the store {tmp_path / 'temporary'}" in result.stderr
    assert not list((tmp_path / "temporary").iterdir())


def test_after_its_removal_another_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAPHSERVE_CACHE", str(tmp_path / "file" / "cache"))
    first = cache_dir()
    assert first.is_dir() and cache_dir() == first
    remove_own_folder()
    assert not first.exists() and cache_dir() != first
    remove_own_folder()
