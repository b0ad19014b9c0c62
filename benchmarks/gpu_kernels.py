"""Generated kernels at an 8B Llama's shapes in bf16, beside the library call a user would pick.

What is bound by memory is replayed from a graph over sets of tensors in turn that no L2 cache holds together: it is
cold as in a step. What is bound by arithmetic is timed alone, as the rate is to which it is compared: run back to back,
both slow down as the device warms.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import capture_stream, graph_us, median_us
from graphserve.kernels import register_all, sampling
from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.sampling_rules import GROUP
from graphserve.kernels.triton import TritonKernel, generate
from tests.gpu.device_kernels import DeviceKernels

TOKENS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, BLOCK, VOCAB = 8192, 4096, 14336, 32, 8, 128, 16, 128256
NORM = {"eps": 1e-5, "offset": 0.0, "weight_fp32": False}
COLD_BYTES = 256 << 20  # of all sets together, several times an L2 cache
RULE = {"scale": DIM**-0.5, "window": 0, "chunk": 0, "softcap": 0.0, "causal": True}


@dataclass
class Measured:
    """One launch to time.

    Attributes:
        op, attrs, args, outputs, dynamic, scalars: as in ``tests.triton_kernel_cases.Case``; outputs are given.
        num_bytes: read and written at least; num_flops: of the matrix products. One of the two gives the rate.
        library: the call a user would pick, with its name; None where there is none.
    """

    op: str
    attrs: dict[str, Any]
    args: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    dynamic: dict[tuple[int | str, int], str]
    scalars: dict[str, int]
    num_bytes: int = 0
    num_flops: int = 0
    library: tuple[str, Callable[[], object]] | None = None
    unpadded: set[int] = field(default_factory=set)  # arguments whose spec is contiguous whatever the step's size

    def kernels(self, target: str) -> list[TritonKernel]:
        args = [None if a is None else self._spec(a, i) for i, a in enumerate(self.args)]
        made = generate(f"gs.{self.op}", self.attrs, args, [self._spec(o, "out") for o in self.outputs], target)
        if isinstance(made, Refusal):
            raise RuntimeError(made.reason)
        return made if isinstance(made, list) else [made]

    def _spec(self, tensor: Tensor, index: int | str) -> ArgSpec:
        shape = tuple(self.dynamic.get((index, axis), size) for axis, size in enumerate(tensor.shape))
        strides = None if index in self.unpadded else tuple(tensor.stride())
        return ArgSpec(str(tensor.dtype).removeprefix("torch."), shape, strides)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def rms_norm() -> Measured:
    x, weight = randn(TOKENS, HIDDEN), randn(HIDDEN)
    library = ("torch.nn.functional.rms_norm", lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-5))
    return Measured("rms_norm", NORM, [x, weight], [torch.empty_like(x)], {(0, 0): "T", ("out", 0): "T"},
                    {"T": TOKENS}, num_bytes=4 * x.numel(), library=library)  # fmt: skip


def add_rms_norm() -> Measured:
    x, residual, weight = randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN), randn(HIDDEN)
    library = ("add and torch.nn.functional.rms_norm", lambda: F.rms_norm(x + residual, (HIDDEN,), weight, 1e-5))
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", (1, 0): "T", ("out", 0): "T"}
    outputs = [torch.empty_like(x), torch.empty_like(x)]
    return Measured("add_rms_norm", NORM, [x, residual, weight], outputs, dynamic, {"T": TOKENS},
                    num_bytes=8 * x.numel(), library=library)  # fmt: skip


def act_mul() -> Measured:
    gate, up = randn(TOKENS, 2 * INNER).chunk(2, dim=-1)
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", (1, 0): "T", ("out", 0): "T"}
    out = torch.empty(TOKENS, INNER, dtype=torch.bfloat16, device="cuda")
    library = ("torch.nn.functional.silu and mul", lambda: F.silu(gate) * up)
    return Measured("act_mul", {"act": "silu"}, [gate, up], [out], dynamic, {"T": TOKENS},
                    num_bytes=6 * out.numel(), library=library)  # fmt: skip


def rope_kv_write() -> Measured:
    sizes = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
    merged = randn(TOKENS, sum(sizes))
    q, k, v = (p.unflatten(1, (-1, DIM)) for p in merged.split(sizes, 1))
    kv_k, kv_v = pool(TOKENS // BLOCK + 1)
    positions = torch.arange(TOKENS, device="cuda")
    args: list[Tensor | None] = [q, k, v, randn(TOKENS, DIM), randn(TOKENS, DIM), positions, None, None, kv_k, kv_v]
    args.append(positions + BLOCK)
    dynamic: dict[tuple[int | str, int], str] = {(i, 0): "T" for i in (0, 1, 2, 5, 10, "out")}
    dynamic |= {(8, 0): "num_blocks", (9, 0): "num_blocks"}
    out = torch.empty(TOKENS, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    num_bytes = 4 * merged.numel() + 2 * 2 * TOKENS * DIM  # everything in and out once, and the tables
    return Measured("rope_kv_write", {**NORM, "style": "half"}, args, [out], dynamic, {"T": TOKENS},
                    num_bytes=num_bytes)  # fmt: skip


def linear(rows: int, product: str = "default") -> Measured:
    x, weight = randn(rows, HIDDEN), randn(2 * INNER, HIDDEN)
    out = torch.empty(rows, 2 * INNER, dtype=torch.bfloat16, device="cuda")
    library_out, transposed = torch.empty_like(out), weight.t()
    attrs = {} if product == "default" else {"product": product, "bucket_rows": rows}
    return Measured("linear", attrs, [x, weight, None], [out], {(0, 0): "T", ("out", 0): "T"}, {"T": rows},
                    num_bytes=2 * (x.numel() + weight.numel() + out.numel()),
                    library=("torch.mm", lambda: torch.mm(x, transposed, out=library_out)))  # fmt: skip


def pool(num_blocks: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer as the KV cache lays them out."""
    size = KV_HEADS * BLOCK * DIM
    blocks = randn(num_blocks, 2 * size)
    keys, values = (part.unflatten(1, (KV_HEADS, BLOCK, DIM)) for part in blocks.split(size, 1))
    return keys, values


def attention(seqs: int, queries: int, context: int, **attrs: int) -> Measured:
    """``seqs`` sequences of ``queries`` new tokens each; the library reads contiguous keys and values."""
    tokens, per_seq = seqs * queries, context // BLOCK
    kv_k, kv_v = pool(seqs * per_seq + 1)
    table = (torch.randperm(seqs * per_seq, device="cuda") + 1).int().view(seqs, per_seq)
    starts = torch.arange(seqs + 1, dtype=torch.int32, device="cuda") * queries
    lens = torch.full((seqs,), context, dtype=torch.int32, device="cuda")
    args = [randn(tokens, HEADS, DIM), kv_k, kv_v, table, starts, lens, None, None]
    out = torch.empty(tokens, HEADS * DIM, dtype=torch.bfloat16, device="cuda")
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", ("out", 0): "T", (1, 0): "num_blocks"}
    dynamic |= {(2, 0): "num_blocks", (3, 0): "S", (3, 1): "B_0", (4, 0): "S+1", (5, 0): "S"}
    q = randn(seqs, HEADS, queries, DIM)
    k, v = (randn(seqs, KV_HEADS, context, DIM) for _ in range(2))

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

    visible = queries * (2 * context - queries + 1) // 2  # pairs of a query and a key it sees
    is_decode = queries == 1
    return Measured(
        "paged_attention", RULE | attrs, args, [out], dynamic, {"T": tokens, "S": seqs, "B_0": per_seq},
        num_bytes=2 * (k.numel() + v.numel() + 2 * q.numel()) if is_decode else 0,
        num_flops=0 if is_decode else 4 * seqs * HEADS * DIM * visible,
        library=("scaled_dot_product_attention, contiguous cache", sdpa), unpadded={3},
    )  # fmt: skip


def greedy_tokens() -> Measured:
    logits = randn(64, VOCAB)
    out = torch.empty(64, dtype=torch.int64, device="cuda")
    return Measured("greedy_tokens", {}, [logits], [out], {(0, 0): "R", ("out", 0): "R"}, {"T": 64, "R": 64, "S": 64},
                    num_bytes=2 * logits.numel(), library=("torch.argmax", lambda: logits.argmax(-1)))  # fmt: skip


def process_logits(dtype: torch.dtype) -> Measured:
    """Temperature, and lists of token ids of which every row's is empty, as a step has them."""
    logits = (randn(64, VOCAB) * 3).to(dtype)
    starts = torch.zeros(65, dtype=torch.int32, device="cuda")
    ids = torch.zeros(1024, dtype=torch.int32, device="cuda")
    counts, one = ids.float(), torch.ones(64, device="cuda")
    args = [logits, one, None, None, None, starts, ids, starts, ids, counts, starts, ids, one]
    args += [starts, ids, counts, one, one]
    dynamic: dict[tuple[int | str, int], str] = {(i, 0): "R+1" for i in (5, 7, 10, 13)}
    dynamic |= {(i, 0): "R" for i in (0, 1, 12, 16, 17, "out")}
    outputs = [torch.empty(64, VOCAB, device="cuda"), torch.empty(64, -(-VOCAB // GROUP), device="cuda")]
    return Measured("process_logits", {}, args, outputs, dynamic, {"T": 64, "R": 64, "S": 64},
                    num_bytes=logits.nbytes + sum(o.nbytes for o in outputs))  # fmt: skip


def limited_scores(top_k: int, top_p: float, min_p: float, spread: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Scores, the largest of each group, and the limits of 64 rows."""
    scores = torch.randn(64, VOCAB, device="cuda") * spread
    group_max = F.pad(scores, (0, -VOCAB % GROUP), value=-torch.inf).view(64, -1, GROUP).amax(-1)
    limits = [torch.full((64,), value, device="cuda") for value in (top_k, top_p, min_p)]
    return scores, group_max, [limits[0], limits[1], limits[2].log()]


def sampling_cut(top_k: int, top_p: float, min_p: float, spread: float = 3.0) -> Measured:
    """The rate is that of the whole rows, of which top-k reads a part."""
    scores, group_max, limits = limited_scores(top_k, top_p, min_p, spread)
    outputs = [torch.empty(64, device="cuda") for _ in range(2)]
    dynamic: dict[tuple[int | str, int], str] = {(i, 0): "R" for i in (0, 1, 2, 3, 4, "out")}
    return Measured("sampling_cut", {}, [scores, group_max, *limits], outputs, dynamic, {"T": 64, "R": 64, "S": 64},
                    num_bytes=scores.nbytes)  # fmt: skip


def sample_tokens(top_k: int, top_p: float, min_p: float) -> Measured:
    """The rate is that of the whole rows, of which only groups that keep something are read."""
    scores, group_max, limits = limited_scores(top_k, top_p, min_p, spread=3.0)
    row_max, cut = sampling.sampling_cut(scores, group_max, *limits)
    keys = torch.randint(-(2**31), 2**31, (64, 2), device="cuda").int()
    args = [scores, group_max, row_max, cut, torch.ones(64, device="cuda"), keys]
    out = torch.empty(64, dtype=torch.int64, device="cuda")
    dynamic: dict[tuple[int | str, int], str] = {(i, 0): "R" for i in (0, 1, 2, 3, 4, 5, "out")}
    return Measured("sample_tokens", {}, args, [out], dynamic, {"T": 64, "R": 64, "S": 64},
                    num_bytes=scores.nbytes)  # fmt: skip


MEASURED: dict[str, Callable[[], Measured]] = {
    "rms_norm 8192x4096": rms_norm,
    "add_rms_norm 8192x4096": add_rms_norm,
    "act_mul 8192x14336": act_mul,
    "rope_kv_write 8192 tokens": rope_kv_write,
    "linear 1 row, default": lambda: linear(1),
    "linear 1 row, gemv": lambda: linear(1, "gemv"),
    "linear 1 row, split_k": lambda: linear(1, "split_k"),
    "linear 8 rows": lambda: linear(8),
    "linear 16 rows": lambda: linear(16),
    "attention decode 64x4096, mixed kernel": lambda: attention(64, 1, 4096),
    "attention decode 64x4096": lambda: attention(64, 1, 4096, max_query_len=1),
    "attention decode 64x4096, 4 segments": lambda: attention(64, 1, 4096, max_query_len=1, segments=4),
    "attention decode 1x4096, 16 segments": lambda: attention(1, 1, 4096, max_query_len=1, segments=16),
    "attention prefill 1x8192": lambda: attention(1, 8192, 8192),
    "greedy_tokens 64x128256": greedy_tokens,
    "process_logits 64x128256, bf16": lambda: process_logits(torch.bfloat16),
    "process_logits 64x128256, fp32": lambda: process_logits(torch.float32),
    "sampling_cut 64x128256, top-k 50, top-p 0.9, min-p 0.01": lambda: sampling_cut(50, 0.9, 0.01),
    "sampling_cut 64x128256, top-p 0.9": lambda: sampling_cut(0, 0.9, 0.0),
    "sampling_cut 64x128256, top-p 0.9, nearly equal scores": lambda: sampling_cut(0, 0.9, 0.0, spread=0.1),
    "sample_tokens 64x128256, top-k 50, top-p 0.9, min-p 0.01": lambda: sample_tokens(50, 0.9, 0.01),
    "sample_tokens 64x128256, all kept": lambda: sample_tokens(0, 1.0, 0.0),
}


def measure_kernels(seconds_left: Callable[[], float], reserve_s: float = 90) -> dict[str, Any]:
    """Rates of every kernel in :data:`MEASURED`; stops when less than ``reserve_s`` of the run is left."""
    register_all()
    device = DeviceKernels(torch.device("cuda", torch.cuda.current_device()))
    rows: dict[str, Any] = {}
    for name, make in MEASURED.items():
        if seconds_left() < reserve_s:
            rows[name] = {"skipped": "no time left"}
            continue
        try:
            rows[name] = _measure(make, device)
        except Exception:  # noqa: BLE001 - the suite's isolation boundary, once a kernel: its row says what it raised
            rows[name] = {"error": traceback.format_exc()[-3000:]}
        torch.cuda.empty_cache()
    return rows


def _measure(make: Callable[[], Measured], device: DeviceKernels) -> dict[str, Any]:
    first = make()
    num_sets = max(2, -(-COLD_BYTES // first.num_bytes)) if first.num_bytes else 2
    cases = [first, *(make() for _ in range(num_sets - 1))]
    with torch.cuda.stream(capture_stream()):
        bound = [device.bind(c.kernels(device.target), [*c.args, *c.outputs], c.scalars) for c in cases]

    def launch_all(launches: Sequence[Callable[[], object]]) -> None:
        for launch in launches:
            launch()

    row = {"ours": _rate(first, _time(first, [partial(launch_all, launches) for launches in bound]))}
    calls = [case.library for case in cases if case.library is not None]
    if calls:
        row["library"] = {"call": calls[0][0], **_rate(first, _time(first, [call for _, call in calls]))}
    return row


def _time(case: Measured, works: Sequence[Callable[[], object]]) -> float:
    if case.num_bytes:
        return graph_us(works)
    with torch.cuda.stream(capture_stream()):
        return median_us(works[0])


def _rate(case: Measured, us: float) -> dict[str, Any]:
    if case.num_bytes:
        return {"us": round(us, 2), "gb_s": round(case.num_bytes / us / 1e3, 1)}
    return {"us": round(us, 2), "tflop_s": round(case.num_flops / us / 1e6, 1)}
