"""Launches of every kernel family for the device's tests: a serving model's shapes, smaller where the CPU would wait.

Tensors are made on the CPU. Names of dtypes are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphserve.kernels import sampling
from graphserve.kernels.triton.norm import ARGUMENTS
from tests.triton_attention_cases import paged_case
from tests.triton_kernel_cases import Case

Dynamic = dict[tuple[int | str, int], str]
PREFILL = [(66, 66), (300, 300)]
# One token a sequence (max_query_len 1) promises as well that sequences without a token come last.
DECODE = [(1, 1), (1, 1500), (1, 65), (1, 700), (0, 0)]
MIXED = [(1, 1), (1, 900), (5, 5), (0, 0), (17, 400), (130, 130)]
ATTENTION: dict[str, tuple[list[tuple[int, int]], dict[str, Any]]] = {
    "prefill": (PREFILL, {}),
    "decode": (DECODE, {"max_query_len": 1}),
    "decode split": (DECODE, {"max_query_len": 1, "segments": 4}),
    "mixed": (MIXED, {"padding": 3}),
    "window": (MIXED, {"window": 128}),
    "chunk": (MIXED, {"chunk": 64}),
    "sinks": (MIXED, {"sinks": True}),
    "sinks split": (DECODE, {"sinks": True, "max_query_len": 1, "segments": 4}),
    "soft cap": (MIXED, {"softcap": 5.0}),
    "alibi": (MIXED, {"alibi": True}),
    "heads of 64": (MIXED, {"k_dim": 64}),
    "heads of 80": (MIXED, {"k_dim": 80}),
    "heads of 256": (MIXED, {"k_dim": 256}),
    "one key head": (MIXED, {"kv_heads": 1}),
    "latent": (DECODE, {"kv_heads": 1, "k_dim": 576, "v_dim": 512, "latent": True, "value_is_key_prefix": True}),
}


def drawn(*shape: int, dtype: str = "float32", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))


def norm_case(op: str, rows: int, width: int, dtype: str, offset: float = 0.0, weight_fp32: bool = False) -> Case:
    """Any op of ``graphserve.kernels.triton.norm.ARGUMENTS``."""
    args: list[Tensor | None] = []
    dynamic: Dynamic = {("out", 0): "T"}
    for i, name in enumerate(ARGUMENTS[op]):
        is_rows = name in ("x", "residual")
        args.append(drawn(rows, width, dtype=dtype, seed=i) if is_rows else drawn(width, dtype=dtype, seed=i))
        dynamic |= {(i, 0): "T"} if is_rows else {}
    attrs: dict[str, Any] = {"eps": 1e-5}
    if "layer_norm" not in op:
        attrs |= {"offset": offset, "weight_fp32": weight_fp32}
    if op == "norm_add_rms_norm":
        attrs["post_eps"] = 1e-6
    if op.endswith("_quant"):
        attrs["dtype"] = "int8"
    return Case(op, op, attrs, args, dynamic, {"T": rows})


def act_mul_case(act: str, rows: int, width: int, dtype: str) -> Case:
    """Gate and up as column slices of one buffer, as a merged projection leaves them."""
    gate, up = drawn(1, rows, 2 * width, dtype=dtype).chunk(2, dim=-1)
    return Case(act, "act_mul", {"act": act}, [gate, up], {(0, 1): "T", (1, 1): "T", ("out", 1): "T"}, {"T": rows})


def quantize_case(rows: int, width: int, dtype: str) -> Case:
    x = drawn(rows, width, dtype=dtype)
    return Case("quantize", "quantize_rows", {"dtype": "int8"}, [x], {(0, 0): "T", ("out", 0): "T"}, {"T": rows})


def _cache(kv_heads: int, block_size: int, dim: int, dtype: str) -> Tensor:
    """A strided view into a pool of 40 blocks, as the runner's cache layers are."""
    size = kv_heads * block_size * dim
    pool = torch.zeros(40, size + 64, dtype=getattr(torch, dtype))
    return pool[:, :size].view(40, kv_heads, block_size, dim)


def rope_kv_case(tokens: int, dtype: str, style: str = "half", norms: bool = True, rotary: int = 128) -> Case:
    """q, k and v as column slices of one merged projection of 8 query and 2 key heads of 128."""
    heads, kv_heads, dim = 8, 2, 128
    sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
    parts = drawn(tokens, sum(sizes), dtype=dtype).split(sizes, 1)
    q, k, v = (p.unflatten(1, (n, dim)) for p, n in zip(parts, (heads, kv_heads, kv_heads), strict=True))
    angles = drawn(512, rotary) * 3
    tables = [angles.cos().to(q.dtype), angles.sin().to(q.dtype)]
    weights = [drawn(dim, seed=i).abs().add(0.5).to(q.dtype) if norms else None for i in (1, 2)]
    slots = torch.randperm(39 * 16, generator=torch.Generator().manual_seed(0))[:tokens] + 16
    positions = torch.randint(0, 512, (tokens,), generator=torch.Generator().manual_seed(1))
    caches = [_cache(kv_heads, 16, dim, dtype) for _ in range(2)]
    args: list[Tensor | None] = [q, k, v, *tables, positions, *weights, *caches, slots]
    dynamic: Dynamic = {(i, 0): "T" for i in (0, 1, 2, 5, 10, "out")}
    dynamic |= {(8, 0): "num_blocks", (9, 0): "num_blocks"}
    attrs = {"eps": 1e-6, "offset": 0.0, "weight_fp32": False, "style": style}
    return Case("rope_kv_write", "rope_kv_write", attrs, args, dynamic, {"T": tokens}, mutated=(8, 9))


def kv_write_case(tokens: int, dtype: str) -> Case:
    full = rope_kv_case(tokens, dtype)
    args = [full.args[i] for i in (1, 2, 8, 9, 10)]
    dynamic: Dynamic = {(i, 0): "T" for i in (0, 1, 4)}
    dynamic |= {(2, 0): "num_blocks", (3, 0): "num_blocks"}
    return Case("kv_write", "kv_write", {}, args, dynamic, {"T": tokens}, mutated=(2, 3))


def embedding_case(tokens: int, dtype: str) -> Case:
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    args: list[Tensor | None] = [ids, drawn(1000, 2560, dtype=dtype)]
    return Case("embedding", "embedding", {}, args, {(0, 1): "T", ("out", 1): "T"}, {"T": tokens})


def gather_rows_case(dtype: str) -> Case:
    x, indices = drawn(1, 90, 2560, dtype=dtype), torch.tensor([89, 0, 3, 17])
    dynamic: Dynamic = {(0, 1): "T", (1, 0): "R", ("out", 1): "R"}
    scalars = {"T": 90, "R": 4}
    return Case("gather_rows", "gather_rows", {}, [x, indices], dynamic, scalars, reference=_gathered)


def _gathered(x: Tensor, indices: Tensor) -> Tensor:
    return x.index_select(1, indices)


def linear_case(op: str, product: str, rows: int, dtype: str, n: int = 520, k: int = 2048) -> Case:
    """``linear`` or ``linear_add``; ``product`` chooses the kernel, ``default`` leaves it to the generator."""
    weight = (drawn(n, k, seed=1) / k**0.5).to(getattr(torch, dtype))
    args: list[Tensor | None] = [drawn(1, rows, k, dtype=dtype), weight, drawn(n, dtype=dtype)]
    dynamic: Dynamic = {(0, 1): "T", ("out", 1): "T"}
    if op == "linear_add":
        args.append(drawn(1, rows, n, dtype=dtype, seed=2))
        dynamic[3, 1] = "T"
    attrs = {} if product == "default" else {"product": product, "bucket_rows": rows}
    reference = getattr(torch.ops.gs, op)
    return Case(op, op, attrs, args, dynamic, {"T": rows}, reference=lambda *tensors, **_: reference(*tensors))


def moe_case(rows: int, dtype: str, is_gpt_oss: bool = False) -> Case:
    """Eight experts, two a token; gpt-oss's layout is transposed and interleaved, with biases and a clamp."""
    num_experts, top_k, hidden, inner = 8, 2, 512, 256
    up = drawn(num_experts, 2 * inner, hidden) / hidden**0.5
    down = drawn(num_experts, hidden, inner) / inner**0.5
    attrs: dict[str, Any] = {"act": "silu", "transposed": False, "interleaved": False, "limit": 0.0, "alpha": 0.0}
    biases: list[Tensor | None] = [None, None]
    if is_gpt_oss:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        attrs = {"act": "swiglu_clamp", "transposed": True, "interleaved": True, "limit": 7.0, "alpha": 1.702}
        biases = [drawn(num_experts, 2 * inner, dtype=dtype), drawn(num_experts, hidden, dtype=dtype)]
    attrs |= {"has_gate": True, "weights_on_input": False}
    generator = torch.Generator().manual_seed(rows)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(rows)])
    to = getattr(torch, dtype)
    weights = torch.rand(rows, top_k, generator=generator).to(to)
    args = [drawn(rows, hidden, dtype=dtype), ids, weights, up.to(to), biases[0], down.to(to), biases[1]]
    return Case("moe", "moe", attrs, args, {(i, 0): "T" for i in (0, 1, 2, "out")}, {"T": rows})


def attention_case(name: str, dtype: str) -> Case:
    lengths, options = ATTENTION[name]
    shape: dict[str, Any] = {"heads": 8, "kv_heads": 2, "k_dim": 128, **options}
    return paged_case(name, lengths, dtype=getattr(torch, dtype), **shape)


def _row_case(op: str, args: list[Tensor | None], attrs: dict[str, Any] | None = None) -> Case:
    """A sampler op: every tensor with as many rows as the first one has the step's rows in front."""
    assert args[0] is not None
    rows = args[0].shape[0]
    dynamic: Dynamic = {("out", 0): "R"}
    for index, arg in enumerate(args):
        if arg is not None and arg.shape[0] in (rows, rows + 1):
            dynamic[index, 0] = "R" if arg.shape[0] == rows else "R+1"
    return Case(op, op, attrs or {}, args, dynamic, {"R": rows, "T": 1, "S": 1})


def logits_case(rows: int, vocab: int, dtype: str) -> Case:
    """Temperature, bitmask, banned ids, and repetition, frequency and presence penalties."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:30] for _ in range(rows)]).flatten().int()
    starts = (torch.arange(rows + 1) * 30).int()
    temperature = torch.linspace(0, 1.5, rows)
    bitmask = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), generator=generator).to(torch.int32)
    penalty = torch.linspace(0.8, 1.4, rows)
    counts = torch.randint(1, 9, ids.shape, generator=generator).float()
    args: list[Tensor | None] = [drawn(rows, vocab, dtype=dtype), temperature, bitmask, None, None, starts, ids]
    args += [None, None, None, starts, ids, penalty, starts, ids, counts, penalty / 4, penalty / 8]
    return _row_case("process_logits", args)


def cut_case(rows: int, vocab: int) -> Case:
    scores = drawn(rows, vocab) * 3
    group_max = sampling.process_logits(scores, *[None] * 17)[1]
    number = torch.arange(rows)
    top_k = torch.where(number % 3 == 0, 0, 20 + number)
    top_p = torch.where(number % 2 == 0, 0.9, 1.0)
    log_min_p = torch.where(number % 5 == 0, 0.02, 0.0).log()
    return _row_case("sampling_cut", [scores, group_max, top_k, top_p, log_min_p])


def sample_case(rows: int, vocab: int) -> Case:
    """Half of the rows greedy, all tokens within a distance of 6."""
    scores = drawn(rows, vocab) * 3
    keys = torch.randint(-(2**31), 2**31, (rows, 2), generator=torch.Generator().manual_seed(9)).to(torch.int32)
    temperature = (torch.arange(rows) % 2).float()
    group_max = sampling.process_logits(scores, *[None] * 17)[1]
    limits = [scores.amax(-1), torch.full((rows,), 6.0)]
    return _row_case("sample_tokens", [scores, group_max, *limits, temperature, keys])


def greedy_case(rows: int, vocab: int, dtype: str) -> Case:
    return _row_case("greedy_tokens", [drawn(rows, vocab, dtype=dtype)])


def logprobs_case(rows: int, vocab: int, dtype: str) -> Case:
    return _row_case("top_logprobs", [drawn(rows, vocab, dtype=dtype), torch.arange(rows) * 3], {"count": 5})
