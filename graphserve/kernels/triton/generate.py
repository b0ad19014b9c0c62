"""From an op with literal shapes to Triton kernels, or the reason there are none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from graphserve.kernels.arg_spec import ArgSpec, Call, Refusal, Refused
from graphserve.kernels.triton.kernel import TARGETS, TritonKernel

Generated = TritonKernel | list[TritonKernel]
Generator = Callable[[Call, str], Generated]

# Op → module of this package with a function of the op's name that generates it.
GENERATORS: dict[str, tuple[str, str]] = {
    "rms_norm": ("norm", "norm"),
    "add_rms_norm": ("norm", "norm"),
    "layer_norm": ("norm", "norm"),
    "add_layer_norm": ("norm", "norm"),
    "norm_add": ("norm", "norm"),
    "norm_add_rms_norm": ("norm", "norm"),
    "rms_norm_quant": ("norm", "norm"),
    "add_rms_norm_quant": ("norm", "norm"),
    "activation": ("activation", "activation"),
    "rope": ("rope_kv", "rope"),
    "rope_kv_write": ("rope_kv", "rope_kv_write"),
    "rope_kv_write_quant": ("rope_kv", "rope_kv_write"),
    "kv_write": ("rope_kv", "rope_kv_write"),
    "kv_write_quant": ("rope_kv", "rope_kv_write"),
    "pointwise": ("pointwise", "pointwise"),
    "concat": ("concat", "concat"),
    "embedding": ("embedding", "embedding"),
    "gather_rows": ("embedding", "gather_rows"),
    "act_mul": ("activation", "act_mul"),
    "act_mul_quant": ("activation", "act_mul_quant"),
    "linear": ("gemm", "linear"),
    "linear_add": ("gemm", "linear"),
    "linear_w8": ("gemm", "linear"),
    "linear_w8a8": ("gemm", "linear"),
    "quantize_rows": ("quantize", "quantize_rows"),
    "moe": ("moe", "moe"),
    "route": ("route", "route"),
    "paged_attention": ("attention", "attention"),
    "paged_attention_quant": ("attention", "attention"),
    "paged_attention_quant_rows": ("attention", "attention"),
    "packed_attention": ("attention", "attention"),
    "process_logits": ("sampler_logits", "process_logits"),
    "sampling_cut": ("sampler_cut", "sampling_cut"),
    "sample_tokens": ("sampler_draw", "sample_tokens"),
    "greedy_tokens": ("sampler_draw", "greedy_tokens"),
    "top_logprobs": ("sampler_logprobs", "top_logprobs"),
    "step_prologue": ("step", "step_prologue"),
    "step_epilogue": ("step", "step_epilogue"),
}


def generator_of(op: str) -> Generator | None:
    """The generator of an op (without ``gs.``), None where there is none."""
    if op not in GENERATORS:
        return None
    module, function = GENERATORS[op]
    generator: Generator = getattr(importlib.import_module(f"graphserve.kernels.triton.{module}"), function)
    return generator


def generate(
    op: str, attrs: dict[str, Any], args: list[ArgSpec | None], outputs: list[ArgSpec], target: str
) -> Generated | Refusal:
    """Generate the kernel of one launch.

    Args:
        op: op name, with or without the ``gs.`` prefix; ``gather_rows`` stands for an index_select of rows, ``concat``
            for a cat over the last dimension.
        attrs: the op's non-tensor arguments by name.
        args: its tensor arguments in schema order, None for absent ones.
        outputs: its results in order.
        target: one of :data:`graphserve.kernels.triton.kernel.TARGETS`.

    Returns:
        The kernel, a list of kernels to launch in order, or a Refusal whose reason names what is not covered.

    Raises:
        ValueError: unknown target.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown: use one of {', '.join(TARGETS)}")
    name = op.removeprefix("gs.")
    generator = generator_of(name)
    if generator is None:
        return Refusal(f"{op} has no Triton generator")
    try:
        return generator(Call(name, attrs, args, outputs), target)
    except Refused as refused:
        return Refusal(f"{op}: {refused}")
