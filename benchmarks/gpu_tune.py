"""Sweeps over what the kernel generators choose by a table: tiles, warps, stages, segments. Prints the best of each.

    python -m benchmarks.gpu_tune [--output DIR] [--only gemv,gemm,prefill,decode,rope]

Each row gives the median time and the rate of every variant of one launch, best first, beside the library call. The
choices in ``graphserve/kernels/triton`` that a sweep decides name it. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import Measured, attention, randn, rope_kv_write
from benchmarks.gpu_timing import median_us
from graphserve.kernels import register_all
from graphserve.kernels.triton import attention as attention_module
from graphserve.kernels.triton import gemm, gemv, rope_kv
from graphserve.kernels.triton.attention_form import AttentionTile
from graphserve.kernels.triton.compile import compile_for
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.kernels.triton.matmul import Tile
from tests.gpu.device_kernels import DeviceKernels

# [N, K] of the products of an 8B Llama layer and of its head.
SHAPES = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)
}  # fmt: skip
Variant = tuple[str, Callable[[ExitStack], None], dict[str, Any]]


def product(rows: int, shape: tuple[int, int], attrs: dict[str, Any]) -> Measured:
    n, k = shape
    x, weight = randn(rows, k), randn(n, k)
    out = torch.empty(rows, n, dtype=torch.bfloat16, device="cuda")
    library_out, transposed = torch.empty_like(out), weight.t()
    return Measured("linear", attrs, [x, weight, None], [out], {(0, 0): "T", ("out", 0): "T"}, {"T": rows},
                    num_bytes=2 * (x.numel() + weight.numel() + out.numel()),
                    library=("torch.mm", lambda: torch.mm(x, transposed, out=library_out)))  # fmt: skip


def replaced(module: Any, **values: Any) -> Callable[[ExitStack], None]:
    def enter(stack: ExitStack) -> None:
        for name, value in values.items():
            stack.enter_context(patch.object(module, name, value))

    return enter


def gemv_variants() -> Iterator[Variant]:
    for elements in (2048, 4096, 8192, 16384):
        for warps in (2, 4, 8):
            for block_k in (256, 512, 1024, 2048):
                if block_k > elements or elements // warps > 4096 or elements // warps < 512:
                    continue

                def choose(k: int, largest: int, item: int, wanted: int = block_k) -> int:
                    while k % wanted:
                        wanted //= 2
                    return wanted

                num_warps = lambda *_, warps=warps: warps  # noqa: E731
                values = {"_TILE_ELEMENTS": elements, "_num_warps": num_warps, "choose_block_k": choose}
                yield f"{elements} elements, {warps} warps, K {block_k}", replaced(gemv, **values), {"product": "gemv"}


def gemm_variants() -> Iterator[Variant]:
    for n in (16, 32, 64, 128):
        for k in (64, 128, 256):
            for warps, stages in ((4, 3), (4, 5), (8, 4)):
                if n * k * 2 * stages > 200 << 10 or n * k < 2048:
                    continue
                tile = Tile(16, n, k, warps, stages)
                values = {"choose_tile": lambda *_, tile=tile, **__: tile}
                yield f"16x{n}x{k}, {warps} warps, {stages} stages", replaced(gemm, **values), {"product": "gemm"}


def tiles(block_ms: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[Variant]:
    for block_m in block_ms:
        for tile in sizes:
            for warps in (4, 8):
                for stages in (2, 3, 4, 5):
                    chosen = AttentionTile(block_m, tile, warps, stages)
                    enter = replaced(attention_module, choose_tile=lambda *_, chosen=chosen: chosen)
                    yield f"{block_m}x{tile}, {warps} warps, {stages} stages", enter, {}


def rope_variants() -> Iterator[Variant]:
    for elements in (1024, 2048, 4096, 8192):
        for threads in (64, 128, 256, 512):
            if 4 <= elements // threads <= 32:
                values = {"_PROGRAM_ELEMENTS": elements, "_PLAIN_THREADS": threads}
                yield f"{elements} elements, {threads} threads", replaced(rope_kv, **values), {}


def sweeps() -> dict[str, tuple[Callable[[dict[str, Any]], Measured], list[Variant]]]:
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        variants = list(gemv_variants())
        found[f"gemv {name} 1 row"] = (lambda attrs, shape=shape: product(1, shape, attrs), variants)
    for name in ("qkv", "o", "gate_up", "down"):
        for rows in (2, 8):
            make = lambda attrs, rows=rows, shape=SHAPES[name]: product(rows, shape, attrs)  # noqa: E731
            found[f"gemm {name} {rows} rows"] = (make, list(gemm_variants()) if name in ("o", "gate_up") else [])
    found["prefill 1x8192"] = (
        lambda attrs: attention(1, 8192, 8192, **attrs), list(tiles((64, 128), (32, 64, 128)))
    )  # fmt: skip
    for batch, context in ((1, 1024), (1, 4096), (16, 1024), (64, 1024), (64, 4096), (256, 1024)):
        variants = [
            (f"{s} segments", lambda stack: None, {"max_query_len": 1, "segments": s}) for s in (1, 2, 4, 8, 16, 32, 64)
        ]
        make = lambda attrs, batch=batch, context=context: attention(batch, 1, context, **attrs)  # noqa: E731
        found[f"decode {batch}x{context}"] = (make, variants)
    decode = [(label, enter, {"max_query_len": 1, "segments": 4}) for label, enter, _ in tiles((16,), (32, 64, 128))]
    found["decode tiles 64x4096"] = (lambda attrs: attention(64, 1, 4096, **attrs), decode)
    found["rope 8192 tokens"] = (lambda attrs: rope_kv_write(), list(rope_variants()))
    return found


@contextmanager
def entered(enter: Callable[[ExitStack], None]) -> Iterator[None]:
    with ExitStack() as stack:
        enter(stack)
        yield


def run_sweep(
    make: Callable[[dict[str, Any]], Measured], variants: list[Variant], device: DeviceKernels, pool: Executor
) -> Any:
    """Rows of (label, microseconds, rate), best first; a variant that does not compile says why."""
    case = make(variants[0][2] if variants else {"product": "auto"})
    kernels: dict[str, list[TritonKernel]] = {}
    failed: dict[str, str] = {}
    attrs_before = dict(case.attrs)
    for label, enter, attrs in variants:
        with entered(enter):
            case.attrs = attrs_before | attrs
            try:
                kernels[label] = case.kernels(device.target)
            except Exception as error:  # noqa: BLE001 - a variant outside of what compiles: its row says so
                failed[label] = str(error)[:120]
    distinct = {k.key: k for made in kernels.values() for k in made}
    targets = [device.target] * len(distinct)
    done = dict(zip(distinct, pool.map(_compiled, distinct.values(), targets), strict=True))
    rows = []
    for label, made in kernels.items():
        if any(isinstance(done[k.key], str) for k in made):
            failed[label] = next(str(done[k.key]) for k in made if isinstance(done[k.key], str))[:120]
            continue
        try:
            for kernel in made:
                device.adopt(kernel, done[kernel.key])
            launches = device.bind(made, [*case.args, *case.outputs], case.scalars)

            def ours(launches: Any = launches) -> None:
                for launch in launches:
                    launch()

            spills = sum(done[k.key].num_spills for k in made)
            rows.append({"variant": label, **gpu_kernels._rate(case, median_us(ours, repeats=12)), "spills": spills})
        except Exception as error:  # noqa: BLE001 - as above
            failed[label] = str(error)[:120]
    rows.sort(key=lambda row: row["us"])
    result: dict[str, Any] = {"rows": rows[:12], "num_failed": len(failed), "failed": dict(list(failed.items())[:3])}
    if case.library is not None:
        result["library"] = gpu_kernels._rate(case, median_us(case.library[1], repeats=12))
    return result


def _compiled(kernel: TritonKernel, target: str) -> Any:
    try:
        return compile_for(kernel, target)
    except Exception as error:  # noqa: BLE001 - the variant's row says what the compiler raised
        return f"{type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="", help="beginnings of names of sweeps, separated by commas")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_tune needs a CUDA device: torch.cuda.is_available() is false", file=sys.stderr)
        return 2
    register_all()
    device = DeviceKernels(torch.device("cuda", torch.cuda.current_device()))
    wanted = tuple(args.only.split(",")) if args.only else ("",)
    results: dict[str, Any] = {}
    pool = ProcessPoolExecutor(max(2, (os.cpu_count() or 4) - 2), multiprocessing.get_context("spawn"))
    for name, (make, variants) in sweeps().items():
        if not name.startswith(wanted):
            continue
        try:
            results[name] = run_sweep(make, variants, device, pool)
            best = results[name]["rows"][:3]
            print(name, json.dumps(best), "library", results[name].get("library"), flush=True)
        except Exception:  # noqa: BLE001 - one sweep's fault leaves the others
            results[name] = {"error": traceback.format_exc()[-2000:]}
            print(name, results[name]["error"][-300:], flush=True)
        torch.cuda.empty_cache()
    pool.shutdown()
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "gpu_tune.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
