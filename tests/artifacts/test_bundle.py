"""Bundles: what was exported is imported elsewhere, and nothing else gets in."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import zstandard

from graphserve.artifacts import ArtifactStore, open_store
from graphserve.artifacts.bundle import export_bundle, import_bundle
from graphserve.errors import ConfigError


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "store")
    store.put("plan", {"n": 1}, {"plan.json": b"{}" * 500, "constants": b"\0" * 99}, "a plan", {"seconds": 2.0})
    store.put("cpp", {"n": 2}, {"library.so": b"\x7fELF", "source.cpp": b"int x;"}, "a library")
    return store


def contents(store: ArtifactStore) -> dict[str, bytes]:
    files = (path for artifact in store.artifacts() for path in artifact.folder.iterdir())
    return {str(path.relative_to(store.root)): path.read_bytes() for path in files}


def test_a_bundle_carries_everything_to_another_place(store: ArtifactStore, tmp_path: Path) -> None:
    bundle = tmp_path / "made" / "model.tar.zst"
    assert export_bundle(store.artifacts(), bundle) == 2
    other = ArtifactStore(tmp_path / "other")
    assert import_bundle(bundle, other) == 2 and contents(other) == contents(store)
    assert import_bundle(bundle, other) == 0, "what is there is not written again"
    again = tmp_path / "again.tar.zst"
    export_bundle(other.artifacts(), again)
    assert again.read_bytes() == bundle.read_bytes(), "the same artifacts gave other bytes"
    assert str(tmp_path).encode() not in zstandard.ZstdDecompressor().stream_reader(bundle.read_bytes()).read()


def test_a_bundle_repairs_what_is_damaged(store: ArtifactStore, tmp_path: Path) -> None:
    bundle, other = tmp_path / "x.tar.zst", ArtifactStore(tmp_path / "other")
    export_bundle(store.artifacts(), bundle)
    import_bundle(bundle, other)
    next(other.artifacts("cpp")).path("library.so").write_bytes(b"other")
    assert import_bundle(bundle, other) == 1 and contents(other) == contents(store)


def test_a_bundle_has_the_permissions_of_any_new_file(store: ArtifactStore, tmp_path: Path) -> None:
    bundle, plain = tmp_path / "x.tar.zst", tmp_path / "plain"
    export_bundle(store.artifacts(), bundle)
    plain.touch()
    assert bundle.stat().st_mode == plain.stat().st_mode


def test_an_artifact_that_is_deleted_meanwhile_is_named(store: ArtifactStore, tmp_path: Path) -> None:
    chosen = list(store.artifacts())
    shutil.rmtree(chosen[0].folder)
    with pytest.raises(ConfigError, match="was deleted while it was exported"):
        export_bundle(chosen, tmp_path / "x.tar.zst")
    assert not (tmp_path / "x.tar.zst").exists()


def members_of(bundle: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    raw = zstandard.ZstdDecompressor().stream_reader(bundle.read_bytes()).read()
    with tarfile.open(None, "r", io.BytesIO(raw)) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def test_a_bundle_that_ends_between_two_members_is_cut_off(store: ArtifactStore, tmp_path: Path) -> None:
    bundle, other = tmp_path / "x.tar.zst", ArtifactStore(tmp_path / "other")
    export_bundle(store.artifacts(), bundle)
    write_bundle(bundle, members_of(bundle)[:-1])
    with pytest.raises(ConfigError, match="cut off: 1 of the artifacts"):
        import_bundle(bundle, other)
    assert len(list(other.artifacts())) == 1 and all(reason is None for _, reason in other.verify())


def test_a_bundle_takes_no_more_room_than_a_store_may(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("plan", {"n": 3}, {"plan.json": bytes(1 << 20)}, "a bomb")
    bundle = tmp_path / "x.tar.zst"
    export_bundle(store.artifacts(), bundle)
    assert bundle.stat().st_size < 10_000
    monkeypatch.setenv("GRAPHSERVE_CACHE_LIMIT", "100K")
    with pytest.raises(ConfigError, match="unpacks to more than the 102400 bytes .* GRAPHSERVE_CACHE_LIMIT"):
        import_bundle(bundle, ArtifactStore(tmp_path / "other"))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_nothing_of_a_header_that_claims_a_long_name_is_read(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = kind, 1 << 40  # a name of a TiB, of which the file has no byte
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar.zst").write_bytes(zstandard.ZstdCompressor().compress(header))
    with pytest.raises(ConfigError, match="is no regular file"):
        import_bundle(tmp_path / "x.tar.zst", ArtifactStore(tmp_path / "store"))


def test_a_member_of_another_size_than_its_manifest_says_is_not_read(store: ArtifactStore, tmp_path: Path) -> None:
    bundle = tmp_path / "x.tar.zst"
    export_bundle(store.artifacts(), bundle)
    members = members_of(bundle)
    members[-1] = (members[-1][0], members[-1][1] + b"more")
    write_bundle(bundle, members)
    with pytest.raises(ConfigError, match="fails its checksum"):
        import_bundle(bundle, ArtifactStore(tmp_path / "other"))


def test_a_damaged_artifact_is_not_exported(store: ArtifactStore, tmp_path: Path) -> None:
    next(store.artifacts("cpp")).path("library.so").write_bytes(b"other")
    with pytest.raises(ConfigError, match="library.so fails its checksum"):
        export_bundle(store.artifacts(), tmp_path / "x.tar.zst")
    assert not (tmp_path / "x.tar.zst").exists()


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("mode", ["flip", "truncate"])
def test_a_damaged_bundle_is_refused(store: ArtifactStore, tmp_path: Path, place: float, mode: str) -> None:
    bundle = tmp_path / "x.tar.zst"
    export_bundle(store.artifacts(), bundle)
    data = bytearray(bundle.read_bytes())
    if mode == "flip":
        data[int(place * len(data))] ^= 0x55
    else:
        del data[int(place * len(data)) :]
    bundle.write_bytes(data)
    other = ArtifactStore(tmp_path / "other")
    with pytest.raises(ConfigError, match="x.tar.zst"):
        import_bundle(bundle, other)
    assert all(reason is None for _, reason in other.verify()), "something damaged was stored"


def write_bundle(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    raw = io.BytesIO()
    with tarfile.open(None, "w", raw) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    path.write_bytes(zstandard.ZstdCompressor().compress(raw.getvalue()))


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../../evil"),
        tarfile.TarInfo("/etc/evil"),
        tarfile.TarInfo(f"plan/{'a' * 32}/../evil"),
        tarfile.TarInfo(f"plan/{'a' * 32}/plan.json"),
        link(f"plan/{'a' * 32}/plan.json", "/etc/passwd"),
    ],
    ids=lambda m: f"{m.name} {m.linkname}",
)
def test_a_member_that_does_not_belong_into_a_store_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    index = json.dumps([["plan", "a" * 32]]).encode()
    write_bundle(tmp_path / "x.tar.zst", [(tarfile.TarInfo("bundle.json"), index), (member, b"")])
    with pytest.raises(ConfigError, match="does not belong into a store|does not follow its manifest"):
        import_bundle(tmp_path / "x.tar.zst", ArtifactStore(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("index", [b"{}", b"[[1, 2]]", b'[["plan", "../../x"]]', b"no json"])
def test_a_wrong_list_of_contents_is_refused(tmp_path: Path, index: bytes) -> None:
    write_bundle(tmp_path / "x.tar.zst", [(tarfile.TarInfo("bundle.json"), index)])
    with pytest.raises(ConfigError, match="list of contents is damaged"):
        import_bundle(tmp_path / "x.tar.zst", ArtifactStore(tmp_path))


def test_a_run_may_name_a_folder_or_a_bundle_and_nothing_else(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHSERVE_CACHE", str(tmp_path / "cache"))
    bundle = tmp_path / "x.tar.zst"
    export_bundle(store.artifacts(), bundle)
    assert contents(open_store(store.root)) == contents(open_store(bundle)) != {}
    assert open_store(bundle).root == open_store().root == tmp_path / "cache"
    with pytest.raises(ConfigError, match="does not exist: give a folder"):
        open_store(tmp_path / "nothing")
