"""From a kernel's text to a binary of a GPU that need not be there, or to a run in Triton's interpreter.

The only module of the package that imports triton. A compile uses exactly what our launcher passes at run time:
pointers known to be multiples of 16 bytes, step scalars not specialised. Compiling is slow, so results are kept
in a store (:mod:`graphserve.kernels.triton.compiled`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from graphserve.artifacts import ArtifactStore, open_store
from graphserve.artifacts.cache_dir import own_folder
from graphserve.kernels.triton.compiled import CompiledKernel, compile_into
from graphserve.kernels.triton.grid import evaluate, grid_size
from graphserve.kernels.triton.kernel import TARGETS, TRITON_TYPES, TritonKernel

# What a kernel that does not compile raises.
COMPILE_ERRORS = (RuntimeError, TritonError)

_SASS_MMA = re.compile(r"\b(?:[HIQDB]G?MMA|UTC[A-Z]*MMA)\b")
_SASS_OPERATION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_AMD_OPERATION = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)\b", re.MULTILINE)


def gpu_target(target: str) -> GPUTarget:
    """Triton's form of ``cuda:90`` or ``hip:gfx942``.

    Raises:
        ValueError: the target is not one of ours.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown: use one of {', '.join(TARGETS)}")
    backend, arch = target.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def load_jit(kernel: TritonKernel) -> Any:
    """The kernel as a ``triton.JITFunction``. Triton reads source by file, so one is written to the cache directory."""
    return getattr(_load_module(kernel, "jit"), kernel.symbol)


def compile_for(kernel: TritonKernel, target: str, store: ArtifactStore | None = None) -> CompiledKernel:
    """Compile for a target, with no such device present, or take what this version of Triton made before.

    Args:
        store: where compiled kernels are kept; the user's cache by default.

    Raises:
        ValueError: unknown target.
        triton.CompilationError: the source is not a valid kernel.
        RuntimeError: the compiler wants global scratch memory, which our launcher does not pass.
        CacheMissError: it is not stored and the store is strict.
    """
    gpu_target(target)
    store = store if store is not None else open_store()
    return compile_into(store, kernel, target, lambda: _compile(kernel, target), triton.__version__)


def interpret(
    kernels: TritonKernel | Sequence[TritonKernel], tensors: Sequence[Any], scalars: Mapping[str, int]
) -> None:
    """Run the kernels of one launch in Triton's interpreter on CPU tensors; writes the outputs in place.

    The interpreter is exact in fp32 and fp16 only: its bf16 arithmetic is not.

    Args:
        kernels: what ``generate`` gave, one kernel or several that share their scratch memory.
        tensors: the launch's tensor arguments followed by its outputs (torch tensors, None for absent ones).
        scalars: step scalars by name.
    """
    import torch

    from graphserve.kernels.triton.interpreter import Interpreted

    kernels = [kernels] if isinstance(kernels, TritonKernel) else list(kernels)
    scratch_bytes = max(evaluate(kernel.scratch, scalars) for kernel in kernels)
    # What a kernel reads before it wrote it must not look like a number.
    fill = 0 if any(kernel.scratch_zeroed for kernel in kernels) else 0xFF
    scratch = torch.full((scratch_bytes // 16 * 16 + 16,), fill, dtype=torch.uint8)
    for kernel in kernels:
        values: list[Any] = []
        for argument in kernel.arguments:
            if isinstance(argument.source, int):
                tensor = tensors[argument.source]
                dtype = _torch_dtype(argument.type)
                values.append(tensor if tensor.dtype == dtype else tensor.view(dtype))
            elif argument.source == "scratch":
                values.append(scratch.view(_torch_dtype(argument.type)))
            else:
                values.append(int(scalars[argument.source]))
        Interpreted(_load_module(kernel, "interpreted"))(kernel.symbol, grid_size(kernel.grid, scalars), values)


def _torch_dtype(pointer_type: str) -> Any:
    import torch

    names = {triton_name: name for name, triton_name in TRITON_TYPES.items()}
    return getattr(torch, names[pointer_type.removeprefix("*")])


def _load_module(kernel: TritonKernel, purpose: str) -> ModuleType:
    """The kernel's source as a module; ``purpose`` keeps the interpreter's changed copy apart from the compiler's."""
    name = f"graphserve_generated.{purpose}.{kernel.symbol}"
    if name in sys.modules:
        return sys.modules[name]
    path = own_folder() / "triton" / "source" / f"{kernel.symbol}.py"
    text = kernel.source.encode()
    if not path.is_file() or path.read_bytes() != text:
        _write(path, text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # inspect.getsource looks a function's module up by name
    spec.loader.exec_module(module)
    return module


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; several processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def _compile(kernel: TritonKernel, target: str) -> CompiledKernel:
    function = load_jit(kernel)
    signature = {a.name: a.type for a in kernel.arguments}
    pointers = [i for i, a in enumerate(kernel.arguments) if a.type.startswith("*") and a.aligned]
    attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(own_folder() / "triton" / "compiler")
        built = triton.compile(ASTSource(function, signature, {}, attrs), target=gpu_target(target), options=options)
    metadata = built.metadata
    scratch = getattr(metadata, "global_scratch_size", 0) or 0
    if scratch:
        raise RuntimeError(f"{kernel.symbol} needs {scratch} bytes of compiler scratch on {target}; launches pass none")
    if target.startswith("cuda"):
        binary = built.asm["cubin"]
        asm, sass, counts = built.asm["ptx"], *_inspect_cubin(binary)
    else:
        binary, asm, sass = built.asm["hsaco"], built.asm["amdgcn"], ""
        counts = _inspect_amdgcn(asm)
    return CompiledKernel(
        name=metadata.name, target=target, binary=binary, asm=asm, sass=sass, num_warps=metadata.num_warps,
        shared_bytes=metadata.shared, scratch_bytes=scratch, **counts,
    )  # fmt: skip


def _inspect_cubin(cubin: bytes) -> tuple[str, dict[str, int]]:
    """Machine code and its counts, by the cuobjdump that Triton carries."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, f"cuobjdump names no registers: {usage}"
    operations = _SASS_OPERATION.findall(sass)
    return sass, {
        "num_registers": int(registers[1]),
        "num_spills": sum(op.startswith(("STL", "LDL")) for op in operations),
        "num_vector_loads_128": sum(op.startswith(("LDG", "LDGSTS")) and ".128" in op for op in operations),
        "num_vector_stores_128": sum(op.startswith("STG") and ".128" in op for op in operations),
        "num_mma": sum(_SASS_MMA.match(op) is not None for op in operations),
    }


def _inspect_amdgcn(asm: str) -> dict[str, int]:
    def value(name: str) -> int:
        match = re.search(rf"^\s*\.{name}:\s*(\d+)", asm, re.MULTILINE)
        return int(match[1]) if match else 0

    operations = _AMD_OPERATION.findall(asm)
    return {
        "num_registers": value("vgpr_count"),
        "num_spills": value("vgpr_spill_count"),
        "num_vector_loads_128": sum(op in ("global_load_dwordx4", "buffer_load_dwordx4") for op in operations),
        "num_vector_stores_128": sum(op in ("global_store_dwordx4", "buffer_store_dwordx4") for op in operations),
        "num_mma": sum(op.startswith(("v_mfma", "v_smfmac")) for op in operations),
    }
