"""The store: found by every factor, checked before use, written whole, shared between processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graphserve.artifacts import ArtifactStore, locks
from graphserve.artifacts.difference import explain_miss
from graphserve.artifacts.eviction import keep_below_limit, parse_size, prune
from graphserve.artifacts.manifest import MANIFEST_NAME, FileRecord, Manifest, artifact_key
from graphserve.errors import CacheMissError, ConfigError

FACTORS = {"config": "abc", "torch": "2.13.0"}
FILES = {"plan.json": b'{"launches": []}' * 9, "constants.bin": bytes(range(256))}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def put(store: ArtifactStore, **changes: str) -> Path:
    return store.put("plan", {**FACTORS, **changes}, FILES, "a plan", {"seconds": 1.5}).folder


def test_what_was_put_is_found_by_the_same_factors_only(store: ArtifactStore) -> None:
    assert store.find("plan", FACTORS) is None
    put(store)
    found = store.find("plan", dict(reversed(FACTORS.items())))
    assert found is not None and {name: found.read(name) for name in FILES} == FILES
    assert found.manifest.built == {"seconds": 1.5} and found.manifest.label == "a plan"
    assert store.find("plan", {**FACTORS, "torch": "2.12.0"}) is None and store.find("weights", FACTORS) is None


def damaged(folder: Path, name: str, mode: str, seed: int = 0) -> None:
    """Spoil one file in one way."""
    chance = random.Random(seed)
    path = folder / name
    data = bytearray(path.read_bytes())
    if mode == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif mode == "truncate":
        del data[chance.randrange(len(data)) :]
    elif mode == "zero":
        data = bytearray(len(data))
    elif mode == "foreign":
        data = bytearray(b"the file of another program")
    path.unlink()
    if mode != "remove":
        path.write_bytes(data)


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
@pytest.mark.parametrize("mode", ["flip", "truncate", "zero", "foreign", "remove"])
def test_a_damaged_artifact_goes_to_quarantine_and_can_be_replaced(
    store: ArtifactStore, name: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(8):
        damaged(put(store), name, mode, seed)
        caplog.clear()
        assert store.find("plan", FACTORS) is None
        assert name in caplog.text and "moved to quarantine" in caplog.text
    assert len(list((store.root / "quarantine").iterdir())) == 8
    put(store)
    assert store.find("plan", FACTORS) is not None


def test_an_artifact_under_the_name_of_another_is_not_used(store: ArtifactStore) -> None:
    other = put(store, torch="2.12.0")
    other.rename(other.parent / artifact_key("plan", FACTORS))
    assert store.find("plan", FACTORS) is None


def test_no_file_names_the_place_and_no_key_knows_the_time(store: ArtifactStore, tmp_path: Path) -> None:
    folder = put(store)
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in folder.iterdir())
    assert json.loads((folder / MANIFEST_NAME).read_text())["factors"] == FACTORS
    assert put(ArtifactStore(tmp_path / "elsewhere")).name == folder.name
    shutil.copytree(store.root, tmp_path / "copied")
    assert ArtifactStore(tmp_path / "copied").find("plan", FACTORS) is not None


def test_a_manifest_of_another_format_is_not_read() -> None:
    manifest = Manifest(kind="plan", label="x", factors={}, files={}, built={}, format=99)
    with pytest.raises(ValueError, match="format 99"):
        Manifest.decode(manifest.encode())
    for text in (b"[]", b"{}", b"{", b'{"checksum": 1}'):
        with pytest.raises(ValueError):
            Manifest.decode(text)


def test_a_strict_store_refuses_to_build_and_names_the_way_out(tmp_path: Path) -> None:
    strict = ArtifactStore(tmp_path, is_strict=True)
    with pytest.raises(CacheMissError, match="the plan of x .*miss: torch 1 → 2.* graphserve warmup"):
        strict.begin_build("the plan of x", "miss: torch 1 → 2")
    with ArtifactStore(tmp_path).lock("plan", FACTORS), strict.lock("plan", FACTORS):  # what makes nothing never waits
        pass


def test_a_full_disk_costs_the_run_nothing_but_a_warning(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_fsync = os.fsync

    def full(descriptor: int) -> None:
        if str(store.root) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    folder = put(store)
    assert store.root not in folder.parents and "No space left" in caplog.text
    assert store.find("plan", FACTORS) is not None
    assert not any(path.is_file() for path in store.root.rglob("*")), "half an artifact was left behind"


def test_a_store_that_must_keep_what_is_put_refuses_instead(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = ArtifactStore(tmp_path / "file", must_keep=True)
    with pytest.raises(ConfigError, match="file is a file, not the folder of a store"):
        store.require_writable()
    with pytest.raises(ConfigError, match="a plan cannot be stored in"):
        put(store)


def test_what_the_root_does_not_take_is_found_before_what_is_in_it(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store)

    def full(descriptor: int) -> None:
        if str(store.root) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store.put("plan", FACTORS, {"plan.json": b"another"}, "a plan that works here")
    found = store.find("plan", FACTORS)
    assert found is not None and found.read("plan.json") == b"another"


def test_what_was_found_can_be_read_after_it_was_deleted(store: ArtifactStore) -> None:
    put(store)
    found = store.find("plan", FACTORS)
    assert found is not None
    prune(store, max_bytes=0)
    assert not found.folder.exists() and {name: found.read(name) for name in FILES} == FILES
    assert store.find("plan", FACTORS) is None and not (store.root / "quarantine").exists()


def test_an_artifact_that_is_alike_in_all_but_some_factors(store: ArtifactStore) -> None:
    put(store, torch="2.12.0")
    found = store.find_alike("plan", {**FACTORS, "torch": "9"}, ignoring=("torch",))
    assert found is not None and found.read("plan.json") == FILES["plan.json"]
    assert store.find_alike("plan", {**FACTORS, "config": "x"}, ignoring=("torch",)) is None
    assert store.find_alike("plan", {**FACTORS, "more": "x"}, ignoring=("torch",)) is None
    damaged(found.folder, "plan.json", "flip")
    assert store.find_alike("plan", FACTORS, ignoring=("torch",)) is None


def test_a_larger_file_in_the_place_of_another_is_not_read(store: ArtifactStore) -> None:
    with (put(store) / "plan.json").open("wb") as file:
        file.truncate(1 << 40)  # a TiB, of which nothing is on the disk
    assert store.find("plan", FACTORS) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": "\x1b[2Jhello"}, "characters that no manifest"),
        ({"factors": {"a": ["b\nc"]}}, "characters that no manifest"),
        ({"files": {"../evil": FileRecord("0" * 64, 1)}}, "characters that no manifest"),
        ({"files": {"a\0b": FileRecord("0" * 64, 1)}}, "characters that no manifest"),
    ],
)
def test_a_manifest_with_texts_that_are_not_just_shown_is_not_read(changes: dict[str, Any], reason: str) -> None:
    fields: dict[str, Any] = {"kind": "plan", "label": "x", "factors": {}, "files": {}, "built": {}}
    with pytest.raises(ValueError, match=reason):
        Manifest.decode(Manifest(**{**fields, **changes}).encode())


def test_a_manifest_that_is_nested_without_end_is_damaged(store: ArtifactStore) -> None:
    (put(store) / MANIFEST_NAME).write_bytes(b"[" * 200_000)
    assert list(store.artifacts()) == [] and store.find("plan", FACTORS) is None


def test_a_miss_names_the_factors_that_differ(store: ArtifactStore) -> None:
    assert explain_miss(store, "plan", FACTORS) == "nothing stored for it"
    put(store)
    put(store, config="other", torch="2.11.0")
    assert explain_miss(store, "plan", {**FACTORS, "torch": "2.14.0"}) == "miss: torch 2.13.0 → 2.14.0"
    assert explain_miss(store, "plan", {**FACTORS, "config": "new"}, same=("config",)) == "nothing stored for it"
    store.put("plan", {"sources": "a" * 64}, FILES, "x")
    assert explain_miss(store, "plan", {"sources": "b" * 64}) == "miss: other sources"


def test_the_least_recently_used_go_first(store: ArtifactStore) -> None:
    folders = [put(store, torch=str(n)) for n in range(4)]
    for age, folder in enumerate(reversed(folders)):
        os.utime(folder / MANIFEST_NAME, (1000 - age, 1000 - age))
    assert store.find("plan", {**FACTORS, "torch": "0"}) is not None  # used now, so no longer the oldest
    size = sum(path.stat().st_size for path in folders[0].iterdir())
    removed = prune(store, max_bytes=2 * size + 9)
    assert [entry.folder for entry in removed] == folders[1:3]
    assert not prune(store, max_bytes=2 * size) and folders[0].is_dir() and folders[3].is_dir()
    assert not list((store.root / "tmp").iterdir())


def test_what_cannot_be_read_takes_room_too_and_what_is_in_use_stays(store: ArtifactStore) -> None:
    unreadable, quarantined, used, other = (put(store, torch=str(n)) for n in range(4))
    (unreadable / MANIFEST_NAME).write_bytes(b"{}")
    store.quarantine(quarantined, "a test")
    assert {entry.folder.parent.name for entry in prune(store, max_bytes=0, used=[used])} == {"plan", "quarantine"}
    assert used.is_dir() and not unreadable.exists() and not other.exists()
    assert not list((store.root / "quarantine").iterdir())


def test_only_the_cache_of_the_user_is_kept_below_the_limit(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRAPHSERVE_CACHE_LIMIT", "2K")
    folders = [put(store, torch=str(n)) for n in range(4)]
    keep_below_limit(store)
    assert all(folder.is_dir() for folder in folders)
    monkeypatch.setenv("GRAPHSERVE_CACHE", str(store.root))
    keep_below_limit(store, used=folders[:3])
    assert [folder.is_dir() for folder in folders] == [True, True, True, False]
    assert "more than its limit of 2.0 KiB" in caplog.text
    keep_below_limit(store)
    assert sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file()) <= 2048
    monkeypatch.setenv("GRAPHSERVE_CACHE_LIMIT", "8GB")
    with pytest.raises(ConfigError, match="GRAPHSERVE_CACHE_LIMIT: '8GB' is not a size"):
        keep_below_limit(store)


@pytest.mark.parametrize(("text", "size"), [("17", 17), ("2K", 2048), ("3m", 3 << 20), ("8G", 8 << 30)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(f"{text}B")


def _build_once(root: str, log: str) -> None:
    store = ArtifactStore(Path(root))
    with store.lock("plan", FACTORS):
        if store.find("plan", FACTORS) is None:
            time.sleep(0.1)  # long enough for the others to arrive
            with open(log, "a") as file:
                file.write("built\n")
            put(store)


def test_one_process_builds_while_the_others_wait(store: ArtifactStore, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if "torch" not in sys.modules else "spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_build_once, args=(str(store.root), str(log))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert log.read_text() == "built\n"


def test_a_lock_that_is_held_too_long_is_passed_by(store: ArtifactStore, caplog: pytest.LogCaptureFixture) -> None:
    with store.lock("plan", FACTORS), store.lock("plan", FACTORS, timeout_s=0.1):
        put(store)
    assert "another process has been making plan" in caplog.text


def test_a_long_wait_is_said(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "_SILENT_S", 0.05)
    with store.lock("plan", FACTORS), store.lock("plan", FACTORS, timeout_s=0.3):
        pass
    assert caplog.text.count("waiting for another process that is making plan") == 1


_WRITE_FOR_EVER = """
import sys
from pathlib import Path
from graphserve.artifacts import ArtifactStore
store = ArtifactStore(Path(sys.argv[1]))
print("ready", flush=True)
n = 0
while True:
    with store.lock("plan", {"n": n % 3}):
        store.put("plan", {"n": n % 3}, {"a": bytes([n % 256]) * 100_000, "b": bytes([n % 256])}, "x")
    n += 1
"""


@pytest.mark.parametrize("num_kills", [5, pytest.param(100, marks=pytest.mark.full)])
def test_a_writer_killed_at_any_moment_leaves_whole_artifacts(store: ArtifactStore, num_kills: int) -> None:
    chance = random.Random(0)
    for _ in range(num_kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITE_FOR_EVER, str(store.root)], stdout=subprocess.PIPE, text=True
        )
        with writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.1))
            writer.kill()
        assert [reason for _, reason in store.verify() if reason is not None] == []
        with store.lock("plan", {"n": 0}, timeout_s=1.0):  # a killed holder's lock is free
            store.put("plan", {"n": 0}, {"a": b"mine", "b": b""}, "x")
        found = store.find("plan", {"n": 0})
        assert found is not None and found.read("a") == b"mine"
