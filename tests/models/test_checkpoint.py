"""Safetensors headers: what is read, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from graphserve.errors import CheckpointError, ConfigError
from graphserve.models.checkpoint import Checkpoint, read_header

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def file_bytes(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(path: Path, header: dict[str, Any], data: bytes) -> Path:
    path.write_bytes(file_bytes(header, data))
    return path


GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_tensor_of_any_dtype_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file(
        {"scalar": tensor[0, 0].clone(), "matrix": tensor, "none": tensor[:0].clone()}, tmp_path / "model.safetensors"
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.problems == []
    for name, expected in (("scalar", tensor[0, 0]), ("matrix", tensor), ("none", tensor[:0])):
        found = checkpoint.read(name)
        assert found.dtype == dtype and found.shape == expected.shape
        assert torch.equal(found.float(), expected.float())


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(4, 3)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    assert torch.equal(Checkpoint.open(tmp_path).read("x", first_row=1, num_rows=2), tensor[1:3])


def test_a_tensor_stays_valid_when_its_file_is_truncated_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(1 << 16)}, path)
    tensor = Checkpoint.open(tmp_path).read("x")
    with open(path, "r+b") as stream:
        stream.truncate(16)
    assert tensor.sum() == 1 << 16


def test_a_file_that_shrinks_between_check_and_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(1 << 16)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    with open(path, "r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: file ended \d+ bytes early inside tensor x"):
        checkpoint.read("x")


def _with(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "a": {**GOOD["a"], **changes}}


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a safetensors file, or truncated"),
    "garbage": (lambda path: path.write_bytes(b"\xff" * 200), "not a safetensors file, or truncated"),
    "text": (lambda path: path.write_bytes(b"<html>404 not found</html>"), "not a safetensors file, or truncated"),
    "lfs pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    "header not json": (lambda path: path.write_bytes((5).to_bytes(8, "little") + b"{{{{{"), "header is not JSON"),
    "header a list": (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "expected a JSON object"),
    "cut in the header": (lambda path: path.write_bytes(file_bytes(GOOD, bytes(32))[:40]), "header of"),
    "cut in the data": (lambda path: path.write_bytes(file_bytes(GOOD, bytes(32))[:-1]), "truncated: tensor b expects"),
    "bytes too many": (lambda path: write(path, GOOD, bytes(33)), "header lies: tensors end"),
    "unknown dtype": (lambda path: write(path, _with(dtype="F37"), bytes(32)), "tensor a: unknown dtype 'F37'"),
    "shape too large": (
        lambda path: write(path, _with(shape=[2, 4]), bytes(32)),
        "tensor a: expected 32 bytes for F32",
    ),
    "shape negative": (
        lambda path: write(path, _with(shape=[-2, -3]), bytes(32)),
        "tensor a: expected a list of sizes",
    ),
    "shape not ints": (
        lambda path: write(path, _with(shape=[2.0, True]), bytes(32)),
        "tensor a: expected a list of sizes",
    ),
    "offsets reversed": (
        lambda path: write(path, _with(data_offsets=[24, 0]), bytes(32)),
        "tensor a: expected 24 bytes",
    ),
    "offsets missing": (
        lambda path: write(path, {"a": {"dtype": "F32"}}, b""),
        "expected dtype, shape and data_offsets",
    ),
    "overlap": (
        lambda path: write(path, {**GOOD, "b": {**GOOD["b"], "data_offsets": [16, 24]}}, bytes(24)),
        "header lies: tensor b expected at byte",
    ),
    "hole": (
        lambda path: write(path, {**GOOD, "b": {**GOOD["b"], "data_offsets": [26, 34]}}, bytes(34)),
        "header lies: tensor b expected at byte",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = BROKEN[case]
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: ") as raised:
        read_header(path)
    assert message in str(raised.value)
    assert Checkpoint.open(tmp_path).problems == [str(raised.value)]


def test_the_unbroken_file_of_those_cases_is_accepted(tmp_path: Path) -> None:
    entries = read_header(write(tmp_path / "model.safetensors", GOOD, bytes(32)))
    assert {name: entry.shape for name, entry in entries.items()} == {"a": (2, 3), "b": (4,)}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_header_never_raises_anything_but_checkpoint_error(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    original = file_bytes(GOOD, bytes(32))
    position = data.draw(st.integers(0, len(original) - 1))
    damaged = original[:position] + data.draw(st.binary(min_size=0, max_size=4)) + original[position + 1 :]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    assert all(entry.offset + entry.nbytes <= len(damaged) for entry in entries.values())


def shard(folder: Path, weight_map: dict[str, str], files: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path: Path) -> None:
    shard(
        tmp_path,
        {"x": "1.safetensors", "y": "2.safetensors"},
        {"1.safetensors": {"x": torch.ones(2)}, "2.safetensors": {"y": torch.zeros(3)}},
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.problems == []
    assert checkpoint.read("x").tolist() == [1, 1] and checkpoint.read("y").tolist() == [0, 0, 0]


def test_an_index_that_names_a_missing_file_or_tensor_is_reported(tmp_path: Path) -> None:
    weight_map = {"x": "1.safetensors", "y": "2.safetensors", "z": "1.safetensors"}
    shard(tmp_path, weight_map, {"1.safetensors": {"x": torch.ones(2)}})
    assert Checkpoint.open(tmp_path).problems == [
        "model.safetensors.index.json: names 2.safetensors (for y), which does not exist: download it again",
        "1.safetensors: tensor z is named by model.safetensors.index.json but is not in the file",
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": "../../etc/passwd"}}'])
def test_an_index_that_is_not_one_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    (problem,) = Checkpoint.open(tmp_path).problems
    assert problem.startswith("model.safetensors.index.json: ")


def test_a_tensor_in_two_files_without_an_index_is_reported(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "part-1.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "part-2.safetensors")
    assert Checkpoint.open(tmp_path).problems == [
        "part-2.safetensors: tensor x is also in part-1.safetensors: remove one of the files"
    ]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickle_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=rf"only pickle weights \({name}\).*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors file"):
        Checkpoint.open(tmp_path)
