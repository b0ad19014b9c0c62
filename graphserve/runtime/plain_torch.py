"""Memory that launches take beside the plan's buffers while they run as plain torch.

A reference makes its results anew, and much of what leads to them in fp32. Pure arithmetic: no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from graphserve.kernels.attention_parts import AttentionShape
from graphserve.plan.arena import ITEM_SIZE, launch_inputs
from graphserve.plan.schema import Launch, Plan, TensorSpec
from graphserve.plan.symbols import evaluate

# What a reference takes at most, as a multiple of the values it reads and writes; `tests/runtime/test_plain_torch.py`
# measures it. The most is that of rms_norm, which makes fp32 copies of bf16, and of sums of int8, exact in fp64.
_COPIES, _QUANTIZED_COPIES = 4, 8
_ONE_COPY = ("linear", "linear_add", "act_mul", "embedding")
_QUANTIZED_LINEARS = ("linear_w8", "linear_w8a8")  # which widen their weights too
_ATTENTION_RESULT_BYTES = 12  # of each value of an attention that quantizes: three times fp32
# The references of sampling: temporaries of a logit, of which they take so many at a time, and results.
_SAMPLER_BYTES, _SAMPLER_LOGITS, _SCORES_BYTES = 40, 1 << 23, 12


def plain_torch_bytes(plan: Plan, tokens: int, rows: int, max_model_len: int) -> int:
    """What the launch of a model that takes most takes, in a step of so many tokens and logits rows."""
    base: dict[str, str] = {}  # view → the buffer that it shows
    most = 0
    for launch in plan.launches:
        if launch.kind == "view":
            source = next(launch_inputs(launch))
            base |= {name: base.get(source, source) for name in launch.outputs if name is not None}
        else:
            most = max(most, _launch_bytes(plan, launch, base, tokens, rows, max_model_len))
    return most


def plain_sampler_bytes(num_logits: int) -> int:
    """What a launch takes that samples on the device from so many logits."""
    return max(_SAMPLER_BYTES * min(num_logits, _SAMPLER_LOGITS), _SCORES_BYTES * num_logits)


def _launch_bytes(
    plan: Plan, launch: Launch, base: Mapping[str, str], tokens: int, rows: int, max_model_len: int
) -> int:
    op = launch.op.split(".")[1]
    results = [name for name in launch.outputs if name is not None]
    if op.startswith("paged_attention"):
        layer = plan.cache_layers[int(launch.args[1]["v"].split(".")[1])]
        result = plan.buffers[results[0]]
        count = _count(result, tokens, rows)
        shape = AttentionShape(count // tokens // layer.v_dim, layer.kv_heads, layer.k_dim, layer.v_dim)
        size = ITEM_SIZE[result.dtype] if op == "paged_attention" else _ATTENTION_RESULT_BYTES
        return count * size + shape.most_bytes(min(tokens, max_model_len), max_model_len)
    values = {base.get(name, name) for name in launch_inputs(launch)} | set(results)
    is_quantized = "quant" in op or op in _QUANTIZED_LINEARS
    copies = 1 if op in _ONE_COPY else _QUANTIZED_COPIES if is_quantized else _COPIES
    if op == "moe":  # a term of the sum for each expert of a row, in fp32
        ids = launch.args[1]["v"]
        copies += int(plan.buffers[base.get(ids, ids)].shape[-1])
    specs = [plan.buffers[name] for name in values if name in plan.buffers]  # a step's own inputs are small
    if op in _QUANTIZED_LINEARS:
        specs += [plan.weights[name].spec for name in values if name in plan.weights]
    return copies * sum(_count(spec, tokens, rows) * ITEM_SIZE[spec.dtype] for spec in specs)


def _count(spec: TensorSpec, tokens: int, rows: int) -> int:
    return math.prod(evaluate(dim, tokens, rows) for dim in spec.shape)
