"""The second kernel of split attention: partial results of a query's key segments become one, and may be quantized."""

from __future__ import annotations

import textwrap

from graphserve.kernels.arg_spec import Call, Refused
from graphserve.kernels.quantized_types import QUANTIZED_MAX, SMALLEST_ABSMAX
from graphserve.kernels.triton.attention_form import AttentionForm
from graphserve.kernels.triton.attention_source import is_quantized, rounded
from graphserve.kernels.triton.expressions import limited, quantized, round_to, stored_type
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, next_power_of_2

_BODY = """
# One program a query token and head. Softmax over segments: each result weighs as much as its sum of weights.
# A segment without visible keys has the logarithm -inf, and its result was not written.
row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
segment = tl.arange(0, SEGMENT_COLUMNS)
column = tl.arange(0, V_COLUMNS)
first = row * SEGMENTS
log_sums = partial_ptr + T.to(tl.int64) * (HEADS * SEGMENTS * V_DIM)
log_sum = tl.load(log_sums + first + segment, mask=segment < SEGMENTS, other=float("-inf"))
largest = tl.max(log_sum, 0)
weight = tl.exp2(log_sum - tl.where(largest == float("-inf"), 0.0, largest))
address = partial_ptr + (first + segment)[:, None] * V_DIM + column[None, :]
is_written = (log_sum != float("-inf"))[:, None] & (column < V_DIM)[None, :]
results = tl.load(address, mask=is_written, other=0.0)
total = tl.sum(weight, 0)
result = tl.sum(results * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total){factors}
tl.store(out_ptr + row * V_DIM + column, {value}, mask=column < V_DIM)
"""


# Elements of all heads of a token, padded to powers of two, that one program can hold.
MAX_TOKEN_ELEMENTS = 32768

_QUANTIZE_BODY = """
# One program a query token: the scale is that of all heads. Softmax over segments, as in the kernel that only reduces.
token = tl.program_id(0).to(tl.int64)
head = tl.arange(0, HEAD_ROWS)
column = tl.arange(0, V_COLUMNS)
first = (token * HEADS + head) * SEGMENTS
log_sums = partial_ptr + T.to(tl.int64) * (HEADS * SEGMENTS * V_DIM)
largest = tl.full([HEAD_ROWS], float("-inf"), tl.float32)
# No constant, or the compiler would unroll every round and hold all segments at once.
segments = tl.minimum(T, 1) * SEGMENTS
for segment in range(segments):
    log_sum = tl.load(log_sums + first + segment, mask=head < HEADS, other=float("-inf"))
    largest = tl.maximum(largest, log_sum)
largest = tl.where(largest == float("-inf"), 0.0, largest)
total = tl.zeros([HEAD_ROWS], tl.float32)
value = tl.zeros([HEAD_ROWS, V_COLUMNS], tl.float32)
for segment in range(segments):
    log_sum = tl.load(log_sums + first + segment, mask=head < HEADS, other=float("-inf"))
    weight = tl.exp2(log_sum - largest)
    is_written = (log_sum != float("-inf"))[:, None] & (column < V_DIM)[None, :]
    result = tl.load(partial_ptr + (first + segment)[:, None] * V_DIM + column[None, :], mask=is_written, other=0.0)
    value += result * weight[:, None]
    total += weight
value = {rounded}
absmax = tl.maximum(tl.max(tl.max(tl.abs(value), axis=1), axis=0), SMALLEST)
inverse = LIMIT / absmax
place = token * (HEADS * V_DIM) + head[:, None] * V_DIM + column[None, :]
inside = (head < HEADS)[:, None] & (column < V_DIM)[None, :]
tl.store(quantized_ptr + place, {quantized}, mask=inside)
tl.store(scale_ptr + token, absmax / LIMIT)
"""


def partial_bytes(form: AttentionForm) -> str:
    """Scratch memory of a launch: an fp32 result and a logarithm for each token, head and segment."""
    heads = form.kv_heads * form.group
    return f"T * {4 * heads * form.segments * (form.v_dim + 1)}"


def reduce_kernel(call: Call, form: AttentionForm, names: list[str]) -> TritonKernel:
    """The kernel that runs after the segments' one, on the same scratch memory.

    Args:
        call: the launch.
        form: of the segments' kernel.
        names: the launch's tensors in order.
    """
    text = KernelText(call, f"{call.op}_reduce")
    factors = ""
    if form.cache_dtype != form.dtype:
        text.pointer("v_scale_ptr", names.index("v_scale"))
        factors += " * tl.load(v_scale_ptr)"
    if is_quantized(form.out_dtype):
        text.pointer("out_scale_ptr", names.index("out_scale"))
        factors += " / tl.load(out_scale_ptr)"
    text.scratch("partial_ptr", "float32")
    text.output("out_ptr", 0)
    text.scalar("T")
    heads = form.kv_heads * form.group
    text.constants(HEADS=heads, SEGMENTS=form.segments, SEGMENT_COLUMNS=next_power_of_2(form.segments))
    text.constants(V_DIM=form.v_dim, V_COLUMNS=next_power_of_2(form.v_dim))
    body = textwrap.dedent(_BODY).format(factors=factors, value=rounded("result", form.out_dtype))
    num_warps = 4 if form.segments * form.v_dim > 4096 else 2
    return text.build(body, ("T", heads, 1), num_warps, scratch=partial_bytes(form))


def quantize_kernel(call: Call, form: AttentionForm, target: str) -> TritonKernel:
    """The kernel that runs after the segments' one and quantizes each token's row.

    Raises:
        Refused: a token has more elements than a program holds.
    """
    heads, dtype = form.kv_heads * form.group, form.out_dtype
    head_rows, columns = next_power_of_2(heads), next_power_of_2(form.v_dim)
    if head_rows * columns > MAX_TOKEN_ELEMENTS:
        raise Refused(f"{heads} heads of {form.v_dim} are more than the {MAX_TOKEN_ELEMENTS} elements of a program")
    text = KernelText(call, f"{call.op}_reduce")
    text.scratch("partial_ptr", "float32")
    text.output("quantized_ptr", 0, stored_type(call.outputs[0], target))
    text.output("scale_ptr", 1)
    text.scalar("T")
    text.constants(HEADS=heads, HEAD_ROWS=head_rows, SEGMENTS=form.segments)
    text.constants(V_DIM=form.v_dim, V_COLUMNS=columns, LIMIT=QUANTIZED_MAX[dtype], SMALLEST=SMALLEST_ABSMAX)
    body = textwrap.dedent(_QUANTIZE_BODY).format(
        rounded=round_to(form.dtype, "value / tl.where(total == 0.0, 1.0, total)[:, None]"),
        quantized=quantized(text, limited("value * inverse", dtype), dtype, target),
    )
    num_warps = min(16, max(2, head_rows * columns // 1024))
    return text.build(body, ("T", 1, 1), num_warps, scratch=partial_bytes(form))
