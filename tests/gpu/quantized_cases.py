"""Launches on 8-bit values for the device's tests, and those of groups, routers and joined rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphserve.kernels.pointwise_program import Instruction, PointwiseProgram
from graphserve.kernels.quantize import quantize_rows
from tests.gpu.kernel_cases import DECODE, MIXED, Dynamic, drawn, rope_kv_case
from tests.triton_attention_cases import paged_case
from tests.triton_kernel_cases import Case


def linear_w8a8_case(rows: int, quantized: str, dtype: str, n: int = 528, k: int = 2048) -> Case:
    x, x_scale = quantize_rows(drawn(1, rows, k), quantized)
    weight, scale = quantize_rows(drawn(n, k, seed=1), quantized)
    args: list[Tensor | None] = [x, x_scale, weight, scale.flatten(), drawn(n, dtype=dtype)]
    dynamic: Dynamic = {(0, 1): "T", (1, 1): "T", ("out", 1): "T"}
    return Case("w8a8", "linear_w8a8", {"dtype": dtype}, args, dynamic, {"T": rows})


def linear_w8_case(rows: int, quantized: str, dtype: str, n: int = 528, k: int = 2048) -> Case:
    weight, scale = quantize_rows(drawn(n, k, seed=1), quantized)
    args: list[Tensor | None] = [drawn(1, rows, k, dtype=dtype), weight, scale.flatten(), None]
    return Case("w8", "linear_w8", {}, args, {(0, 1): "T", ("out", 1): "T"}, {"T": rows})


def scaled_cache_case(is_decode: bool, dtype: str) -> Case:
    lengths = DECODE if is_decode else MIXED
    attrs: dict[str, Any] = {"max_query_len": 1, "segments": 4} if is_decode else {}
    shape: dict[str, Any] = {"heads": 8, "kv_heads": 2, "k_dim": 128, **attrs}
    return paged_case("8-bit cache", lengths, dtype=getattr(torch, dtype), cache_dtype=torch.float8_e4m3fn, **shape)


def quantized_rows_case(is_decode: bool, dtype: str) -> Case:
    """Attention whose result is int8 with one scale a token."""
    lengths = DECODE if is_decode else MIXED
    attrs: dict[str, Any] = {"max_query_len": 1, "segments": 4} if is_decode else {}
    shape: dict[str, Any] = {"heads": 8, "kv_heads": 2, "k_dim": 128, "rows_dtype": "int8", **attrs}
    return paged_case("int8 rows", lengths, dtype=getattr(torch, dtype), **shape)


def scaled_cache_write_case(tokens: int, dtype: str) -> Case:
    plain = rope_kv_case(tokens, dtype)
    args = [a.to(torch.float8_e4m3fn) if i in (8, 9) and a is not None else a for i, a in enumerate(plain.args)]
    args += [torch.tensor([0.5]), torch.tensor([0.25])]
    return Case("fp8 write", "rope_kv_write_quant", plain.attrs, args, plain.dynamic, plain.scalars, mutated=(8, 9))


def route_case(router: str, rows: int) -> Case:
    attrs: dict[str, Any] = {
        "mixtral": {"top_k": 2, "scores": "softmax", "normalize": "sum"},
        "qwen3_moe": {"top_k": 8, "scores": "softmax", "normalize": "sum"},
        "gpt_oss": {"top_k": 4, "scores": "none", "normalize": "softmax"},
        "deepseek_v3": {"top_k": 8, "scores": "sigmoid", "normalize": "sum", "eps": 1e-20, "scale": 2.5,
                        "num_groups": 8, "top_groups": 4, "group_top": 2},
    }[router]  # fmt: skip
    shared = {"eps": 0.0, "min_sum": 0.0, "scale": 1.0, "num_groups": 1, "top_groups": 1, "group_top": 1}
    experts = {"mixtral": 8, "qwen3_moe": 128, "gpt_oss": 32, "deepseek_v3": 256}[router]
    args = [2 * drawn(rows, experts), drawn(experts) / 4 if router == "deepseek_v3" else None]
    attrs = shared | attrs | {"dtype": "float32"}
    return Case(router, "route", attrs, args, {(0, 0): "T", ("out", 0): "T"}, {"T": rows})


def group_case(tokens: int, dtype: str) -> Case:
    """A soft cap, the sum with another tensor, a softmax, and a result a row."""
    program = PointwiseProgram(
        2,
        (
            Instruction("aten.div.Tensor", ({"v": 0}, 30.0), dtype),
            Instruction("aten.tanh.default", ({"v": 2},), dtype),
            Instruction("aten.add.Tensor", ({"v": 3}, {"v": 1}), dtype),
            Instruction("aten.softmax.int", ({"v": 4}, -1), dtype),
            Instruction("aten.amax.default", ({"v": 5}, [-1], True), dtype),
        ),
        (5, 6),
    )
    args: list[Tensor | None] = [20 * drawn(tokens, 1000, dtype=dtype), drawn(1000, dtype=dtype)]
    return Case("group", "pointwise", {"program": program.encode()}, args, {(0, 0): "T", ("out", 0): "T"},
                {"T": tokens}, reference=_group)  # fmt: skip


def heads_outside_tokens_case(tokens: int, dtype: str) -> Case:
    """The copy that brings ``[heads, tokens, dim]`` into the order of tokens."""
    program = PointwiseProgram(1, (Instruction("aten.clone.default", ({"v": 0},), dtype),), (1,))
    x = drawn(8, tokens, 128, dtype=dtype).transpose(0, 1)
    return Case("heads", "pointwise", {"program": program.encode()}, [x], {(0, 0): "T", ("out", 0): "T"},
                {"T": tokens}, reference=_group)  # fmt: skip


def _group(*inputs: Tensor, program: str) -> list[Tensor]:
    """The reference computes on inputs widened to fp32, so its results are fp32 as well."""
    if inputs[0].dtype == torch.float32:
        program = program.replace("bfloat16", "float32").replace("float16", "float32")
    return torch.ops.gs.pointwise(list(inputs), program)


def concat_case(tokens: int, dtype: str) -> Case:
    """Two parts of a head, the second shared by all heads."""
    parts: list[Tensor | None] = [drawn(tokens, 16, 128, dtype=dtype), drawn(tokens, 1, 64, dtype=dtype)]
    assert parts[1] is not None
    parts[1] = parts[1].expand(tokens, 16, 64)
    dynamic: Dynamic = {(0, 0): "T", (1, 0): "T", ("out", 0): "T"}
    return Case("concat", "concat", {"dim": -1}, parts, dynamic, {"T": tokens}, reference=_concat)


def _concat(*parts: Tensor, dim: int) -> Tensor:
    return torch.cat(parts, dim)
