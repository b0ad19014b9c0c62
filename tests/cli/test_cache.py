"""``graphserve cache``: what is stored can be listed, checked, moved, compared and deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphserve.artifacts import ArtifactStore
from graphserve.cli.main import main
from graphserve.plan.store import source_hash


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "store")
    store.put("plan", {"torch": "1.0", "graphserve sources": source_hash()}, {"plan.json": b"{}" * 1000}, "a plan")
    store.put("triton", {"kernel": "k", "target": "cuda:90"}, {"binary": b"\x7fELF"}, "norm for cuda:90")
    return store


def test_ls_lists_and_its_json_holds_the_factors(store: ArtifactStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls", "--store", str(store.root)]) == 0
    text = capsys.readouterr().out
    assert "norm for cuda:90" in text and "2 artifacts, 2.0 KiB" in text
    assert main(["cache", "ls", "--json", "--store", str(store.root)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in rows] == ["plan", "triton"] and rows[0]["factors"]["torch"] == "1.0"


def test_verify_is_status_1_and_names_the_damaged_file(
    store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "verify", "--store", str(store.root)]) == 0
    next(store.artifacts("plan")).path("plan.json").write_bytes(b"other")
    assert main(["cache", "verify", "--store", str(store.root)]) == 1
    assert "plan.json fails its checksum" in capsys.readouterr().out
    assert len(list(store.artifacts())) == 2, "verify changed the store"


def test_export_and_import_carry_artifacts(
    store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, other = str(tmp_path / "x.tar.zst"), str(tmp_path / "other")
    assert main(["cache", "export", bundle, "--kind", "triton", "--store", str(store.root)]) == 0
    assert main(["cache", "import", bundle, "--store", other]) == 0
    assert "added 1 artifacts" in capsys.readouterr().out
    assert [a.manifest.kind for a in ArtifactStore(Path(other)).artifacts()] == ["triton"]
    assert main(["cache", "export", bundle, "--kind", "tokenizer", "--store", str(store.root)]) == 2


def test_diff_names_the_factor(store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ArtifactStore(tmp_path / "other")
    for artifact in store.artifacts():
        factors = {**artifact.manifest.factors, **({"torch": "2.0"} if artifact.manifest.kind == "plan" else {})}
        files = {name: artifact.read(name) for name in artifact.manifest.files}
        other.put(artifact.manifest.kind, factors, files, artifact.manifest.label)
    assert main(["cache", "diff", str(store.root), str(store.root)]) == 0
    assert main(["cache", "diff", str(store.root), str(other.root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no difference" and "only in the first (torch 2.0 → 1.0)" in lines[1] and len(lines) == 3
    assert main(["cache", "diff", str(store.root)]) == 1
    text = capsys.readouterr().out
    assert "plan a plan: torch 1.0 → " in text and "sources" not in text and "triton" not in text


def test_prune_deletes_down_to_a_size(store: ArtifactStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "prune", "--max-size", "1K", "--store", str(store.root)]) == 0
    assert sum(a.manifest.num_bytes for a in store.artifacts()) <= 1024
    assert main(["cache", "prune", "--max-size", "much", "--store", str(store.root)]) == 2
    assert "'much' is not a size" in capsys.readouterr().err
