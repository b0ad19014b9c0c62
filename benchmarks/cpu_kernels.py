"""Speed of the generated CPU kernels beside torch's own calls, and of a whole decode step.

    python benchmarks/cpu_kernels.py --dtype bfloat16 --threads 2

Every kernel is checked first, then timed in turns with its rivals (kernel, torch, kernel, ...). Weights rotate over
copies larger than the last-level cache, so GB/s is memory speed. ``--clock cpu`` with one thread counts the thread's
processor time, which is meaningful on a machine shared with others. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import graphserve.kernels
from graphserve.kernels.cpu import (
    ArgSpec,
    CompiledSequence,
    CppKernel,
    Library,
    build,
    compiler,
    generate,
    isa_level,
    pack_linear_weight,
    pack_moe_weights,
)
from graphserve.kernels.pointwise_program import Instruction, PointwiseProgram

# The decoder of the benchmark: 12 layers of 768, 12 query and 6 KV heads of 64, inner size 2048, vocabulary 32000.
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, BLOCK = 12, 768, 12, 6, 64, 2048, 32000, 16
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
ROTATE_BYTES = 96 << 20


class Bench:
    """Builds kernels once and times pairs of calls."""

    def __init__(self, dtype: torch.dtype, threads: int, seconds: float, clock: Callable[[], float]) -> None:
        self.dtype, self.threads, self.seconds, self.clock = dtype, threads, seconds, clock
        self.name = str(dtype).removeprefix("torch.")
        self.store = Path(tempfile.mkdtemp(prefix="graphserve-kernels-"))
        self.results: list[dict[str, Any]] = []

    def spec(self, shape: tuple[int | str, ...], strides: tuple[int, ...] | None = None, dtype: str = "") -> ArgSpec:
        return ArgSpec(dtype or self.name, shape, strides)

    def kernel(self, op: str, attrs: dict[str, Any], args: list[ArgSpec | None], outs: list[ArgSpec]) -> CppKernel:
        kernel = generate(f"gs.{op}", attrs, args, outs, isa_level())
        if not isinstance(kernel, CppKernel):
            raise SystemExit(f"{op}: {kernel.reason}")
        return kernel

    def compare(
        self,
        name: str,
        kernel: Callable[[], Any],
        rivals: dict[str, Callable[[], Any]],
        calls: int,
        size: int,
        flops: int,
    ) -> None:
        """Time the kernel and its rivals in turns; each makes ``calls`` calls of ``size`` bytes and ``flops`` FLOPs."""
        contestants = {"kernel": kernel, **rivals}
        times: dict[str, list[float]] = {label: [] for label in contestants}
        for call in contestants.values():
            call()
        deadline = time.perf_counter() + self.seconds
        while time.perf_counter() < deadline or len(times["kernel"]) < 5:
            for label, call in contestants.items():
                start = self.clock()
                call()
                times[label].append((self.clock() - start) / calls)
        row: dict[str, Any] = {"name": name}
        for label, values in times.items():
            quartiles = statistics.quantiles(values, n=4)
            row[label] = {
                "median_us": quartiles[1] * 1e6, "quartile_us": [quartiles[0] * 1e6, quartiles[2] * 1e6],
                "best_us": min(values) * 1e6, "gb_per_s": size / quartiles[1] / 1e9,
                "gflop_per_s": flops / quartiles[1] / 1e9,
            }  # fmt: skip
        self.results.append(row)
        ours = row["kernel"]
        ratios = ", ".join(f"{label} x{row[label]['median_us'] / ours['median_us']:.2f}" for label in rivals)
        speed = f"{ours['gb_per_s']:6.1f} GB/s {ours['gflop_per_s']:7.1f} GFLOP/s"
        print(f"{name:34s} {ours['median_us']:10.1f} us {speed} | time of {ratios}", flush=True)


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    """Stop the benchmark when a kernel is wrong."""
    error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not error < (3e-2 if actual.dtype == torch.bfloat16 else 1e-4):
        raise SystemExit(f"{name}: relative error {error:.2e}, nothing timed")


def pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def bench_linear(bench: Bench) -> None:
    """Every linear of the decoder at decode and prefill sizes."""
    shapes = [("qkv", QKV, HIDDEN), ("o", HIDDEN, HEADS * HEAD_DIM), ("gate_up", 2 * INNER, HIDDEN),
              ("down", HIDDEN, INNER), ("lm_head", VOCAB, HIDDEN)]  # fmt: skip
    kernels = {
        name: bench.kernel("linear", {}, [bench.spec(("T", k)), bench.spec((n, k)), None], [bench.spec(("T", n))])
        for name, n, k in shapes
    }
    library = build(list(kernels.values()), bench.store)
    for name, n, k in shapes:
        size = n * k * bench.dtype.itemsize
        copies = max(1, ROTATE_BYTES // size)
        weights = [(torch.randn(n, k) * k**-0.5).to(bench.dtype) for _ in range(copies)]
        packed = [pack_linear_weight(w) for w in weights]
        for rows in (1, 8, 32, 512):
            x, out = torch.randn(rows, k).to(bench.dtype), torch.empty(rows, n, dtype=bench.dtype)
            function = library.function_pointer(kernels[name].symbol)
            sequence = CompiledSequence(library, [(function, pointers(x, w, None, out)) for w in packed])
            sequence.run(rows, 0, 0, bench.threads)
            check(name, out, F.linear(x, weights[-1]))
            prepacked = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
            bench.compare(
                f"linear {name} {rows} rows",
                lambda s=sequence, r=rows: s.run(r, 0, 0, bench.threads),  # type: ignore[misc]
                {
                    "torch": lambda ws=weights, a=x: [F.linear(a, w) for w in ws],  # type: ignore[misc]
                    "onednn packed": lambda ws=prepacked, a=x: [  # type: ignore[misc]
                        torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "") for w in ws
                    ],
                },
                copies, size + (x.numel() + out.numel()) * x.element_size(), 2 * rows * n * k,
            )  # fmt: skip


def bench_rowwise(bench: Bench) -> None:
    """Norm and gated product."""
    norm_attrs = {"eps": 1e-5, "offset": 0.0, "weight_fp32": False}
    x_spec, inner, merged = bench.spec(("T", HIDDEN)), bench.spec(("T", INNER)), (2 * INNER, 1)
    norm = bench.kernel("add_rms_norm", norm_attrs, [x_spec, x_spec, bench.spec((HIDDEN,))], [x_spec, x_spec])
    half = bench.spec(("T", INNER), merged)
    gate = bench.kernel("act_mul", {"act": "silu"}, [half, half], [inner])
    library = build([norm, gate], bench.store)
    for rows in (1, 32, 512):
        x, residual = torch.randn(2, rows, HIDDEN).to(bench.dtype)
        weight = torch.rand(HIDDEN).to(bench.dtype)
        normed, total = torch.empty_like(x), torch.empty_like(x)
        function = library.function_pointer(norm.symbol)
        sequence = CompiledSequence(library, [(function, pointers(x, residual, weight, normed, total))])
        sequence.run(rows, 0, 0, bench.threads)
        check("add_rms_norm", normed, torch.ops.gs.add_rms_norm(x, residual, weight, **norm_attrs)[0])
        bench.compare(
            f"add_rms_norm {rows} rows",
            lambda s=sequence, r=rows: s.run(r, 0, 0, bench.threads),  # type: ignore[misc]
            {"torch": lambda a=x, b=residual, w=weight: torch.ops.gs.add_rms_norm(a, b, w, **norm_attrs)},  # type: ignore[misc]  # noqa: E501
            1, 4 * x.numel() * x.element_size(), 5 * x.numel(),
        )  # fmt: skip
        both = torch.randn(rows, 2 * INNER).to(bench.dtype)
        product = torch.empty(rows, INNER, dtype=bench.dtype)
        gates, ups = both.chunk(2, dim=-1)
        sequence = CompiledSequence(library, [(library.function_pointer(gate.symbol), pointers(gates, ups, product))])
        sequence.run(rows, 0, 0, bench.threads)
        check("act_mul", product, F.silu(gates) * ups)
        bench.compare(
            f"act_mul {rows} rows",
            lambda s=sequence, r=rows: s.run(r, 0, 0, bench.threads),  # type: ignore[misc]
            {"torch": lambda g=gates, u=ups: F.silu(g) * u},  # type: ignore[misc]
            1, 3 * product.numel() * product.element_size(), 10 * product.numel(),
        )  # fmt: skip


def paged(dtype: torch.dtype, contexts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random cache of the decoder's shape and a block table of shuffled blocks."""
    counts = [-(-c // BLOCK) for c in contexts]
    pool = torch.randn(sum(counts) + 1, 2, KV_HEADS, BLOCK, HEAD_DIM).to(dtype)
    table = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    order = (torch.randperm(sum(counts)) + 1).int()
    for s, count in enumerate(counts):
        table[s, :count], order = order[:count], order[count:]
    return pool[:, 0], pool[:, 1], table


def attention_kernel(bench: Bench) -> CppKernel:
    block = 2 * KV_HEADS * BLOCK * HEAD_DIM
    cache = bench.spec(("N", KV_HEADS, BLOCK, HEAD_DIM), (block, BLOCK * HEAD_DIM, HEAD_DIM, 1))
    attrs = {"scale": HEAD_DIM**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "causal": True}
    args = [bench.spec(("T", HEADS, HEAD_DIM)), cache, cache, bench.spec(("S", "B_0"), dtype="int32"),
            bench.spec(("S+1",), dtype="int32"), bench.spec(("S",), dtype="int32"), None, None]  # fmt: skip
    return bench.kernel("paged_attention", attrs, args, [bench.spec(("T", HEADS * HEAD_DIM))])


def bench_attention(bench: Bench) -> None:
    """Decode and prefill over the paged cache; torch runs SDPA on keys already gathered and contiguous."""
    kernel = attention_kernel(bench)
    library = build([kernel], bench.store)
    for name, queries, contexts in (("decode 1x4096", 1, [4096]), ("decode 8x512", 1, [512] * 8),
                                    ("decode 32x256", 1, [256] * 32), ("prefill 1x1024", 1024, [1024])):  # fmt: skip
        kv_k, kv_v, table = paged(bench.dtype, contexts)
        tokens = queries * len(contexts)
        q, out = torch.randn(tokens, HEADS, HEAD_DIM).to(bench.dtype), torch.empty(tokens, HIDDEN, dtype=bench.dtype)
        starts = torch.arange(0, tokens + 1, queries, dtype=torch.int32)
        lens = torch.tensor(contexts, dtype=torch.int32)
        arguments = pointers(q, kv_k, kv_v, table, starts, lens, None, None, out)
        sequence = CompiledSequence(library, [(library.function_pointer(kernel.symbol), arguments)])

        def ours(s: CompiledSequence = sequence, t: int = tokens, n: int = len(contexts), b: Tensor = table) -> None:
            s.run(t, 0, n, bench.threads, [b.shape[1]])

        ours()
        rule = {"scale": HEAD_DIM**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "causal": True}
        check(name, out, torch.ops.gs.paged_attention(q, kv_k, kv_v, table, starts, lens, None, None, **rule))
        dense = torch.randn(2, len(contexts), KV_HEADS, contexts[0], HEAD_DIM).to(bench.dtype)
        heads = q.view(len(contexts), queries, HEADS, HEAD_DIM).transpose(1, 2)
        causal = queries > 1
        bench.compare(
            f"attention {name}", ours,
            {"torch": lambda h=heads, d=dense, c=causal: F.scaled_dot_product_attention(  # type: ignore[misc]
                h, d[0], d[1], is_causal=c, enable_gqa=True)},
            1, dense.numel() * dense.element_size(),
            4 * HEADS * HEAD_DIM * tokens * contexts[0] // (2 if causal else 1),
        )  # fmt: skip


def bench_moe(bench: Bench) -> None:
    """8 experts, 2 a row; torch runs the reference, a loop over the experts that have rows."""
    experts, inner = 8, 1024
    attrs = {"act": "silu", "transposed": False, "interleaved": False, "limit": 0.0, "alpha": 0.0}
    x_spec, ids_spec = bench.spec(("T", HIDDEN)), bench.spec(("T", 2), dtype="int64")
    args = [x_spec, ids_spec, bench.spec(("T", 2)), bench.spec((experts, 2 * inner, HIDDEN)), None,
            bench.spec((experts, HIDDEN, inner)), None]  # fmt: skip
    kernel = bench.kernel("moe", attrs, args, [x_spec])
    library = build([kernel], bench.store)
    gate_up = (torch.randn(experts, 2 * inner, HIDDEN) * HIDDEN**-0.5).to(bench.dtype)
    down = (torch.randn(experts, HIDDEN, inner) * inner**-0.5).to(bench.dtype)
    packed_up, packed_down = pack_moe_weights(gate_up, down, False, False)
    for rows in (1, 8, 64):
        x = torch.randn(rows, HIDDEN).to(bench.dtype)
        ids = torch.tensor(torch.rand(rows, experts).argsort(1)[:, :2].tolist())
        weights, out = torch.rand(rows, 2).to(bench.dtype), torch.empty_like(x)
        arguments = pointers(x, ids, weights, packed_up, None, packed_down, None, out)
        sequence = CompiledSequence(library, [(library.function_pointer(kernel.symbol), arguments)])
        sequence.run(rows, 0, 0, bench.threads)
        reference = (x, ids, weights, gate_up, None, down, None)
        check("moe", out, torch.ops.gs.moe(*reference, **attrs))
        touched = len(ids.unique()) * 3 * inner * HIDDEN * x.element_size()
        bench.compare(
            f"moe 8 experts top 2, {rows} rows",
            lambda s=sequence, r=rows: s.run(r, 0, 0, bench.threads),  # type: ignore[misc]
            {"torch": lambda r=reference: torch.ops.gs.moe(*r, **attrs)},  # type: ignore[misc]
            1, touched, 12 * rows * inner * HIDDEN,
        )  # fmt: skip


def bench_route(bench: Bench) -> None:
    """The router of 128 experts, 8 a row; torch runs the reference, one call after the other."""
    experts, top_k = 128, 8
    attrs = {
        "top_k": top_k, "scores": "softmax", "normalize": "sum", "eps": 0.0, "min_sum": 0.0, "scale": 1.0,
        "num_groups": 1, "top_groups": 1, "group_top": 1, "dtype": bench.name,
    }  # fmt: skip
    outs = [bench.spec(("T", top_k)), bench.spec(("T", top_k), dtype="int64")]
    kernel = bench.kernel("route", attrs, [bench.spec(("T", experts)), None], outs)
    library = build([kernel], bench.store)
    for rows in (1, 32, 512):
        # Fresh rows in every call: choosing among the same ones again is faster than any model's router is.
        steps = [torch.randn(rows, experts).to(bench.dtype) for _ in range(max(8, 2048 // rows))]
        weights, ids = torch.empty(rows, top_k, dtype=bench.dtype), torch.empty(rows, top_k, dtype=torch.int64)
        function = library.function_pointer(kernel.symbol)
        sequence = CompiledSequence(library, [(function, pointers(x, None, weights, ids)) for x in steps])
        sequence.run(rows, 0, 0, bench.threads)
        expected_weights, expected_ids = torch.ops.gs.route(steps[-1], None, **attrs)
        check("route weights", weights, expected_weights)
        check("route ids", ids, expected_ids)
        bench.compare(
            f"route {experts} experts top {top_k}, {rows} rows",
            lambda s=sequence, r=rows: s.run(r, 0, 0, bench.threads),  # type: ignore[misc]
            {"torch": lambda xs=steps: [torch.ops.gs.route(x, None, **attrs) for x in xs]},  # type: ignore[misc]
            len(steps), rows * experts * bench.dtype.itemsize, 5 * rows * experts,
        )  # fmt: skip


def bench_pointwise(bench: Bench) -> None:
    """Elementwise groups; torch runs their ATen calls, one after the other."""

    def program(*instructions: tuple[str, tuple[Any, ...]]) -> str:
        made = tuple(Instruction(op, args, bench.name) for op, args in instructions)
        return PointwiseProgram(1, made, (len(made),)).encode()

    v0, v1, v2 = ({"v": n} for n in range(3))
    softcap = program(("aten.div.Tensor", (v0, 30.0)), ("aten.tanh.default", (v1,)), ("aten.mul.Tensor", (v2, 30.0)))
    heads_first = program(("aten.clone.default", (v0,)))
    heads, swapped = (1, HEADS, "T", HEAD_DIM), (0, HEAD_DIM, HEADS * HEAD_DIM, 1)
    groups = {
        "soft cap of logits": (softcap, bench.spec(("T", VOCAB)), bench.spec(("T", VOCAB)), (-1, VOCAB)),
        "heads before tokens": (heads_first, bench.spec(heads, swapped), bench.spec(heads), (1, -1, HEADS, HEAD_DIM)),
    }
    kernels = {
        name: bench.kernel("pointwise", {"program": text}, [source], [out])
        for name, (text, source, out, _) in groups.items()
    }
    library = build(list(kernels.values()), bench.store)
    for name, (text, _, _, shape) in groups.items():
        for rows in (1, 32):
            x = torch.randn(rows, VOCAB if shape[0] == -1 else HIDDEN).to(bench.dtype).reshape(shape)
            x = x if len(shape) == 2 else x.transpose(1, 2)
            out = torch.empty(x.shape, dtype=bench.dtype)
            function = library.function_pointer(kernels[name].symbol)
            sequence = CompiledSequence(library, [(function, pointers(x, out))])
            sequence.run(rows, 0, 0, bench.threads)
            check(name, out, torch.ops.gs.pointwise([x], text)[0])
            bench.compare(
                f"{name}, {rows} rows",
                lambda s=sequence, r=rows: s.run(r, 0, 0, bench.threads),  # type: ignore[misc]
                {"torch": lambda x=x, t=text: torch.ops.gs.pointwise([x], t)},  # type: ignore[misc]
                1, 2 * x.numel() * x.element_size(), 3 * x.numel(),
            )  # fmt: skip


class DecodeStep:
    """All launches of one decode step of the decoder, as one sequence."""

    def __init__(self, bench: Bench, streams: int, context: int) -> None:
        self.bench, self.streams, self.dtype = bench, streams, bench.dtype
        self.kernels: list[tuple[CppKernel, list[int | None]]] = []
        self.tensors: list[Tensor] = []
        kv_k, _, table = paged(bench.dtype, [context] * streams)
        self.table = self.keep(table)
        starts = self.keep(torch.arange(streams + 1, dtype=torch.int32))
        lens = self.keep(torch.full((streams,), context, dtype=torch.int32))
        positions = self.keep(torch.full((streams,), context - 1))
        last = table[:, (context - 1) // BLOCK].long() * BLOCK + (context - 1) % BLOCK
        slots = self.keep(last)
        self.logits = self.new(streams, VOCAB)
        self.weight_bytes = 0
        ids, embedding = self.keep(torch.randint(0, VOCAB, (streams,))), self.random(VOCAB, HIDDEN)
        x, residual, total = (self.new(streams, HIDDEN) for _ in range(3))
        cos, sin = self.random(2048, HEAD_DIM), self.random(2048, HEAD_DIM)
        hidden_spec, norm_weight = bench.spec(("T", HIDDEN)), self.random(HIDDEN)
        norm_attrs = {"eps": 1e-5, "offset": 0.0, "weight_fp32": False}
        vector = bench.spec((HIDDEN,))
        self.add("embedding", {}, [bench.spec(("T",), dtype="int64"), bench.spec((VOCAB, HIDDEN))], [hidden_spec],
                 ids, embedding, residual)  # fmt: skip
        self.add("rms_norm", norm_attrs, [hidden_spec, vector], [hidden_spec], residual, norm_weight, x)
        block = 2 * KV_HEADS * BLOCK * HEAD_DIM
        cache = bench.spec(("N", KV_HEADS, BLOCK, HEAD_DIM), (block, BLOCK * HEAD_DIM, HEAD_DIM, 1))
        head_specs = [bench.spec(("T", n, HEAD_DIM), (QKV, HEAD_DIM, 1)) for n in (HEADS, KV_HEADS, KV_HEADS)]
        q_spec, numbers = bench.spec(("T", HEADS, HEAD_DIM)), bench.spec(("T",), dtype="int64")
        tables = [bench.spec((2048, HEAD_DIM))] * 2
        rope_attrs = {**norm_attrs, "style": "half"}
        attention = attention_kernel(bench)
        qkv, gate_up = self.new(streams, QKV), self.new(streams, 2 * INNER)
        q, attended, gated = self.new(streams, HIDDEN), self.new(streams, HIDDEN), self.new(streams, INNER)
        ends = [HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM]
        for _ in range(LAYERS):
            keys, values, _ = paged(bench.dtype, [context] * streams)
            self.tensors += [keys, values]
            self.linear(x, QKV, HIDDEN, qkv)
            self.add("rope_kv_write", rope_attrs, [*head_specs, *tables, numbers, None, None, cache, cache, numbers],
                     [q_spec], qkv, qkv[:, ends[0] :], qkv[:, ends[1] :], cos, sin, positions, None, None, keys,
                     values, slots, q)  # fmt: skip
            self.kernels.append((attention, pointers(q, keys, values, table, starts, lens, None, None, attended)))
            self.linear(attended, HIDDEN, HIDDEN, x)
            self.norm(hidden_spec, vector, norm_attrs, x, residual, norm_weight, total)
            self.linear(x, 2 * INNER, HIDDEN, gate_up)
            half = bench.spec(("T", INNER), (2 * INNER, 1))
            self.add("act_mul", {"act": "silu"}, [half, half], [bench.spec(("T", INNER))], gate_up,
                     gate_up[:, INNER:], gated)  # fmt: skip
            self.linear(gated, HIDDEN, INNER, x)
            self.norm(hidden_spec, vector, norm_attrs, x, residual, norm_weight, total)
        self.linear(x, VOCAB, HIDDEN, self.logits)
        library: Library = build([kernel for kernel, _ in self.kernels], bench.store)
        self.sequence = CompiledSequence(library, [(library.function_pointer(k.symbol), p) for k, p in self.kernels])

    def keep(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def new(self, *shape: int) -> Tensor:
        return self.keep(torch.zeros(shape, dtype=self.dtype))

    def random(self, *shape: int) -> Tensor:
        return self.keep((torch.randn(shape) * shape[-1] ** -0.5).to(self.dtype))

    def add(
        self, op: str, attrs: dict[str, Any], args: list[ArgSpec | None], outs: list[ArgSpec], *tensors: Tensor | None
    ) -> None:
        self.kernels.append((self.bench.kernel(op, attrs, args, outs), pointers(*tensors)))

    def norm(self, spec: ArgSpec, vector: ArgSpec, attrs: dict[str, Any], x: Tensor, *rest: Tensor) -> None:
        residual, weight, total = rest
        self.add("add_rms_norm", attrs, [spec, spec, vector], [spec, spec], x, residual, weight, x, residual)

    def linear(self, x: Tensor, n: int, k: int, out: Tensor) -> None:
        packed = self.keep(pack_linear_weight(self.random(n, k)))
        self.weight_bytes += packed.numel() * packed.element_size()
        spec = self.bench.spec
        self.add("linear", {}, [spec(("T", k)), spec((n, k)), None], [spec(("T", n))], x, packed, None, out)

    def run(self) -> None:
        self.sequence.run(self.streams, self.streams, self.streams, self.bench.threads, [self.table.shape[1]])


def bench_decode(bench: Bench) -> None:
    """A whole step; stands alone, with no torch call of the same work beside it."""
    for streams in (1, 8, 32):
        step = DecodeStep(bench, streams, context=256)
        step.run()
        if not torch.isfinite(step.logits.float()).all():
            raise SystemExit("the decode step gave logits that are not finite")
        times = []
        deadline = time.perf_counter() + 3 * bench.seconds
        while time.perf_counter() < deadline or len(times) < 5:
            start = bench.clock()
            step.run()
            times.append(bench.clock() - start)
        median, best = statistics.median(times), min(times)
        row = {"name": f"decode step, {streams} streams, context 256", "median_ms": median * 1e3, "best_ms": best * 1e3,
               "tokens_per_s": streams / median, "weight_gb_per_s": step.weight_bytes / median / 1e9}  # fmt: skip
        bench.results.append(row)
        print(
            f"{row['name']:34s} {median * 1e3:.2f} ms (best {best * 1e3:.2f}), {streams / median:.0f} tokens/s,"
            f" weights at {row['weight_gb_per_s']:.1f} GB/s, {len(step.kernels)} launches",
            flush=True,
        )


SECTIONS = {"linear": bench_linear, "rowwise": bench_rowwise, "attention": bench_attention, "moe": bench_moe,
            "route": bench_route, "pointwise": bench_pointwise, "decode": bench_decode}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each pair")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args()
    if compiler() is None:
        print("no C++ compiler found: install g++ or clang++, or point $CXX at one", file=sys.stderr)
        return 1
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu counts one thread: use it with --threads 1")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    graphserve.kernels.register_all()
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    bench = Bench(getattr(torch, options.dtype), options.threads, options.seconds, clock)
    for name in options.only:
        SECTIONS[name](bench)
    machine = {"machine": platform.machine(), "isa": isa_level(), "compiler": compiler(), "torch": torch.__version__}
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "dtype": options.dtype,
        "threads": options.threads,
        "clock": options.clock,
    }
    print(json.dumps({**facts, **machine, "results": bench.results}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
