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
    (store.root / "plan" / ("0" * 32)).mkdir(parents=True)
    assert main(["cache", "prune", "--max-size", "0", "--store", str(store.root)]) == 0
    assert not list(store.folders()), "what cannot be read was left"


def test_a_bundle_can_be_looked_at_where_it_is(
    store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(tmp_path / "x.tar.zst")
    assert main(["cache", "export", bundle, "--store", str(store.root)]) == 0
    for action, text in (("ls", f"2 artifacts, 2.0 KiB, in {bundle}"), ("verify", "verified 2 artifacts")):
        assert main(["cache", action, "--store", bundle]) == 0
        assert text in capsys.readouterr().out
    assert main(["cache", "export", str(tmp_path / "again.tar.zst"), "--store", bundle]) == 0
    assert (tmp_path / "again.tar.zst").read_bytes() == Path(bundle).read_bytes()
    assert main(["cache", "prune", "--store", bundle]) == 2


@pytest.mark.parametrize("action", [["ls"], ["verify"], ["prune"], ["export", "x.tar.zst"]])
def test_a_store_that_does_not_exist_is_told(
    action: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "typo")
    assert main(["cache", *action, "--store", place]) == 2
    assert place in capsys.readouterr().err


def test_what_is_damaged_is_told_and_not_exported(
    store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (next(store.artifacts("plan")).folder / "manifest.json").write_text("{}")
    assert main(["cache", "ls", "--store", str(store.root)]) == 0
    assert "1 artifacts, 4 B" in (text := capsys.readouterr().out) and "1 cannot be read" in text
    assert main(["cache", "export", str(tmp_path / "x.tar.zst"), "--store", str(store.root)]) == 2
    assert "is damaged (manifest.json" in capsys.readouterr().err
    assert main(["cache", "diff", str(store.root), str(store.root)]) == 1
    assert "damaged (manifest.json" in capsys.readouterr().out


def test_an_import_that_would_not_stay_is_refused(
    store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(tmp_path / "x.tar.zst")
    assert main(["cache", "export", bundle, "--store", str(store.root)]) == 0
    (tmp_path / "file").touch()
    assert main(["cache", "import", bundle, "--store", str(tmp_path / "file")]) == 2
    assert "is a file, not the folder of a store" in capsys.readouterr().err


def test_an_empty_store_differs_from_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "diff", str(tmp_path)]) == 2
    assert "has no artifacts" in capsys.readouterr().err


def test_a_kind_that_does_not_exist_is_refused_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["cache", "export", "x.tar.zst", "--kind", "bogus"])
    assert stop.value.code == 2 and "'triton'" in capsys.readouterr().err
