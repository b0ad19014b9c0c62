"""Entry of ``paged_attention``."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ITEM_SIZES, Call, Refused, require_unit_stride
from graphserve.kernels.cpu.entries import Entry, flag
from graphserve.kernels.cpu.kernel import NUM_THREADS, cpp_dim, cpp_float, pointer, require_same_dtype

# The scratch of a thread grows with the head size; beyond this it would leave the L2 cache.
MAX_HEAD_DIM = 1024


def paged_attention(call: Call) -> Entry:
    """Prefill, decode and mixed batches; q may be a strided slice, the cache strided by block.

    With the attribute ``batch_invariant`` a query's result has the same bits whatever else is in the step: keys are not
    split among threads, and blocks of keys begin where their positions say.
    """
    names = ("q", "kv_k", "kv_v", "block_table", "query_start_loc", "seq_lens")
    q, kv_k, kv_v, table, starts, lens = (call.tensor(i, name) for i, name in enumerate(names))
    sinks, alibi, out = call.optional(6), call.optional(7), call.outputs[0]
    cpp_type = require_same_dtype(("q", q), ("kv_k", kv_k), ("kv_v", kv_v), ("output", out))
    for name, spec in (("q", q), ("kv_k", kv_k), ("kv_v", kv_v), ("output", out)):
        require_unit_stride(spec, name)
    for name, spec in (("block_table", table), ("query_start_loc", starts), ("seq_lens", lens)):
        if spec.dtype != "int32":
            raise Refused(f"{name} must be int32, got {spec.dtype}")
    for name, optional in (("sinks", sinks), ("alibi", alibi)):
        if optional is not None and optional.dtype != "float32":
            raise Refused(f"{name} must be float32, got {optional.dtype}: convert it once at load")
    heads, k_dim, kv_heads, v_dim = q.int_dim(1), q.int_dim(2), kv_k.int_dim(1), kv_v.int_dim(3)
    if heads % kv_heads:
        raise Refused(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    if max(k_dim, v_dim) > MAX_HEAD_DIM or k_dim * ITEM_SIZES[q.dtype] % 4:
        raise Refused(f"head sizes {k_dim} and {v_dim}: at most {MAX_HEAD_DIM}, and whole 4-byte words")
    numbers = [
        *(heads, kv_heads, k_dim, v_dim, kv_k.int_dim(2), kv_k.int_stride(0), kv_v.int_stride(0)),
        *(q.int_stride(0), q.int_stride(1)),
    ]
    softcap, invariant = call.attr("softcap"), call.attrs.get("batch_invariant", False)
    rule = [flag(call.attr("causal")), str(call.attr("window")), str(call.attr("chunk"))]
    template_args = [cpp_type, *map(str, numbers), *rule, *(flag(bool(f)) for f in (softcap, sinks, alibi, invariant))]
    fields = [
        *(pointer(spec, i) for i, spec in enumerate((q, kv_k, kv_v, table, starts, lens))),
        *(pointer(sinks, 6), pointer(alibi, 7), pointer(out, 8, const=False)),
        *(cpp_dim(table.stride(0)), cpp_float(call.attr("scale")), cpp_float(softcap)),
    ]
    body = (
        f"  PagedAttention<{', '.join(template_args)}> attention{{\n      {', '.join(fields)}}};\n"
        f"  attention.run({cpp_dim(q.shape[0])}, {cpp_dim(lens.shape[0])}, {NUM_THREADS});"
    )
    return Entry(("linear", "attention"), body)
