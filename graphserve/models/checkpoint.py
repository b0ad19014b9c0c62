"""A checkpoint: the safetensors files of one folder, their headers checked before any data is read.

Format: an 8-byte little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data.
Files are read with plain reads into memory of our own, never mapped: a file that is truncated while mapped kills the
process with SIGBUS on the next access, also for tensors handed out long before.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from graphserve.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# The format's own cap on the header (the reference reader refuses more as well).
MAX_HEADER_BYTES = 100_000_000

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# Stored dtypes that have an exact torch counterpart; the others are packed formats that no float parameter is made of.
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
INTEGER_DTYPES = frozenset(TORCH_DTYPES) - FLOAT_DTYPES


class TensorEntry(msgspec.Struct, frozen=True):
    """One stored tensor. ``offset`` is absolute in the file, in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """All tensors of a folder by name, in the order of files and offsets.

    Invariant: every entry lies inside its file as the file was when opened. ``problems`` lists what is wrong with
    the files (one sentence each); a checkpoint with problems must not be read.
    """

    def __init__(self, directory: Path, tensors: dict[str, TensorEntry], problems: list[str]) -> None:
        self.directory = directory
        self.tensors = tensors
        self.problems = problems

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Read every header of the folder's checkpoint.

        Raises:
            ConfigError: the folder has no safetensors checkpoint; says what it has and what to do.
        """
        directory = Path(directory)
        problems: list[str] = []
        weight_map = _read_index(directory, problems)
        files = list(dict.fromkeys(weight_map.values())) if weight_map is not None else find_weight_files(directory)
        tensors: dict[str, TensorEntry] = {}
        broken: set[str] = set()
        for file in files:
            path = directory / file
            if not path.is_file():
                first = next((name for name, where in (weight_map or {}).items() if where == file), None)
                problems.append(f"{INDEX_NAME}: names {file} (for {first}), which does not exist: download it again")
                broken.add(file)
                continue
            try:
                entries = read_header(path)
            except CheckpointError as error:
                problems.append(str(error))
                broken.add(file)
                continue
            for name, entry in entries.items():
                declared = (weight_map or {}).get(name, file)
                if declared == file and name in tensors:
                    problems.append(f"{file}: tensor {name} is also in {tensors[name].file}: remove one of the files")
                elif declared == file:
                    tensors[name] = entry
        for name, file in (weight_map or {}).items():
            if name not in tensors and file not in broken:
                problems.append(f"{file}: tensor {name} is named by {INDEX_NAME} but is not in the file")
        return cls(directory, tensors, problems)

    def read(self, name: str, first_row: int = 0, num_rows: int | None = None) -> torch.Tensor:
        """Copy one tensor (or rows ``first_row : first_row + num_rows`` of it) out of its file.

        Returns:
            A CPU tensor of the stored dtype and shape that owns its memory.

        Raises:
            CheckpointError: the file can no longer be read, or has become shorter since it was opened.
        """
        import torch

        entry = self.tensors[name]
        shape, offset, nbytes = entry.shape, entry.offset, entry.nbytes
        if num_rows is not None:
            row_bytes = entry.nbytes // shape[0]
            shape, offset, nbytes = (num_rows, *shape[1:]), offset + first_row * row_bytes, num_rows * row_bytes
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        target = memoryview(buffer.numpy().data)
        path = self.directory / entry.file
        try:
            with open(path, "rb", buffering=0) as stream:
                stream.seek(offset)
                while len(target):
                    count = stream.readinto(target)
                    if not count:
                        raise CheckpointError(
                            f"{entry.file}: file ended {len(target)} bytes early inside tensor {name}: it was "
                            "truncated after the check; download it again"
                        )
                    target = target[count:]
        except OSError as error:
            raise CheckpointError(f"{entry.file}: cannot read tensor {name}: {error}") from error
        return buffer.view(getattr(torch, TORCH_DTYPES[entry.dtype])).reshape(shape)


def find_weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files of a folder without an index.

    Raises:
        ConfigError: there is none, or only pickle files.
    """
    if (directory / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    # consolidated*.safetensors is the same model once more, under its makers' own names; adapter_* is a LoRA adapter.
    names = [name for name in names if not name.startswith(("consolidated", "adapter_"))]
    if names:
        return names
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ConfigError(
            f"{directory} has only pickle weights ({', '.join(pickles[:3])}), which can run code when opened and are "
            "never loaded; allowed: *.safetensors. Convert once, in a place you trust: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}', dtype='auto').save_pretrained('CONVERTED_DIR')\", copy the tokenizer "
            "files beside it and serve CONVERTED_DIR"
        )
    raise ConfigError(
        f"{directory} has no *.safetensors file: give a folder with config.json and safetensors weights, or use "
        "load_format='dummy' for random weights"
    )


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one safetensors file against the file's real size.

    Raises:
        CheckpointError: the first thing found wrong, naming file, tensor, expected and found.
    """
    name = path.name
    size = path.stat().st_size
    with open(path, "rb") as stream:
        prefix = stream.read(8)
        if prefix.startswith(b"version "):
            raise CheckpointError(f"{name}: is a git-lfs pointer, not the weights: run `git lfs pull` in the folder")
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{name}: not a safetensors file, or truncated: expected a header of {header_bytes} bytes, found a "
                f"file of {size} bytes"
            )
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not a safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{name}: expected a JSON object as header, found {type(header).__name__}")
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    entries = {key: _entry(name, key, value, data_start) for key, value in header.items()}
    _check_layout(name, entries, data_start, size)
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


def _entry(file: str, tensor: str, value: Any, data_start: int) -> TensorEntry:
    where = f"{file}: tensor {tensor}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets in the header, found {value!r:.80}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r:.40}; known: {', '.join(sorted(DTYPE_BITS))}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(f"{where}: expected a list of sizes as shape, found {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int and at >= 0 for at in offsets):
        raise CheckpointError(f"{where}: expected [begin, end] as data_offsets, found {offsets!r:.80}")
    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    begin, end = offsets
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where}: expected {nbytes} bytes for {dtype} {shape}, found data_offsets of {end - begin} bytes"
        )
    return TensorEntry(file=file, dtype=dtype, shape=tuple(shape), offset=data_start + begin, nbytes=nbytes)


def _check_layout(file: str, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Tensors must tile the data section: no overlap, no hole, nothing beyond the end of the file."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        end = entry.offset + entry.nbytes
        if end > size:
            raise CheckpointError(
                f"{file}: truncated: tensor {name} expects bytes up to {end}, found a file of {size} bytes; "
                "download it again"
            )
        if entry.offset != position:
            raise CheckpointError(
                f"{file}: header lies: tensor {name} expected at byte {position}, found at {entry.offset}"
            )
        position = end
    if position != size:
        raise CheckpointError(
            f"{file}: header lies: tensors end at byte {position}, found a file of {size} bytes; download it again"
        )


def _read_index(directory: Path, problems: list[str]) -> dict[str, str] | None:
    """``{tensor: file}`` of the sharded index, or None when the folder has none (or one that cannot be used)."""
    path = directory / INDEX_NAME
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"{INDEX_NAME}: not a safetensors index ({type(error).__name__}: {error})")
        return {}
    # A file name with a folder in it would let an index point outside the model's folder.
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) and os.path.basename(file) == file for file in weight_map.values())
    ):
        problems.append(f"{INDEX_NAME}: expected weight_map {{tensor: file name}}, found {str(weight_map):.80}")
        return {}
    return weight_map
