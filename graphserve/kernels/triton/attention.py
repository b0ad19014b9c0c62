"""Attention: prefill, decode and mixed steps over the paged cache in one kernel, or packed sequences without a cache.

The work is cut by upper bounds alone: sequence s owns query blocks from ``query_start_loc[s] // BLOCK_Q + s`` on, a
program finds its sequence by binary search, and programs without one stop at once. So a launch depends on the step's
bucket and never on a length.
"""

from __future__ import annotations

import dataclasses

from msgspec.structs import replace

from graphserve.kernels.arg_spec import ITEM_SIZES, ArgSpec, Call, Dim, Refused, product, require_unit_stride
from graphserve.kernels.triton.attention_form import AttentionForm, AttentionTile, choose_tile, head_parts
from graphserve.kernels.triton.attention_loop import E4M3_HELPER, bits_are_converted, lacks_e4m3
from graphserve.kernels.triton.attention_source import LOG2E, attention_body, is_quantized
from graphserve.kernels.triton.attention_split import partial_bytes, quantize_kernel, reduce_kernel
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, require_float

MAX_HEAD_DIM = 576
MAX_SEGMENTS = 128

_RULE = ("sinks", "alibi")
_PAGED = ("q", "kv_k", "kv_v", "block_table", "query_start_loc", "seq_lens", *_RULE)
TENSORS = {
    "paged_attention": _PAGED,
    "paged_attention_quant": (*_PAGED, "k_scale", "v_scale", "out_scale"),
    "paged_attention_quant_rows": _PAGED,
    "packed_attention": ("q", "k", "v", "query_start_loc", *_RULE),
}
_REQUIRED = ("q", "kv_k", "kv_v", "k", "v", "block_table", "query_start_loc", "seq_lens")


def attention(call: Call, target: str) -> TritonKernel | list[TritonKernel]:
    """``gs.paged_attention``, its two quantizing forms and ``gs.packed_attention``.

    Besides the op's own attributes:

    * ``segments``: programs that share the keys of a query; above 1 the result is a list of two kernels. The cut
      depends on a sequence's length alone, so that one count gives one result in any batch.
    * ``max_query_len``: 1 if no sequence of the step has more than one query token and those with none come last.
    * ``value_is_key_prefix``: ``kv_v`` is the view of ``kv_k``'s first columns (a latent cache), which is then read
      once for both.

    Args:
        call: the launch; its tensors are those of :data:`TENSORS`.
        target: what it is compiled for.

    Raises:
        Refused: a dtype, head size or layout outside what the kernel covers.
    """
    tensors = {name: call.optional(i) for i, name in enumerate(TENSORS[call.op])}
    form = _form(call, tensors, target)
    tile = choose_tile(form, target)
    kernels = [_attention_kernel(call, tensors, form, tile, target)]
    if form.quantizes_rows:
        kernels.append(quantize_kernel(call, form, target))
    elif form.is_split:
        kernels.append(reduce_kernel(call, form, list(tensors)))
    return kernels if len(kernels) > 1 else kernels[0]


def _attention_kernel(
    call: Call, tensors: dict[str, ArgSpec | None], form: AttentionForm, tile: AttentionTile, target: str
) -> TritonKernel:
    is_split = form.is_split
    if bits_are_converted(form, target):
        as_bytes = [
            spec and replace(spec, dtype="uint8" if i in (1, 2) else spec.dtype) for i, spec in enumerate(call.args)
        ]
        call = dataclasses.replace(call, args=as_bytes)
    text = KernelText(call, f"{call.op}_segment" if is_split else None)
    unused = {"kv_v"} if form.value_is_key_prefix else set()
    if is_split:
        unused |= {"v_scale", "out_scale"}
    for i, name in enumerate(tensors):
        if name not in unused:
            text.pointer(f"{name}_ptr", i)
    if is_split:
        text.scratch("partial_ptr", "float32")
    else:
        text.output("out_ptr", 0)
    _add_constants(text, tensors, form, tile)
    table = tensors.get("block_table")
    table_length = "" if table is None else _table_length(table)
    text.scalar(*["T"] * (is_split or not form.single_query), "S", *[table_length] * bool(table_length))
    if bits_are_converted(form, target):
        text.helper(E4M3_HELPER)
    blocks: Dim = "T" if form.single_query else f"T // {text.constexprs['BLOCK_Q']} + S + 1"
    grid = (blocks, form.kv_heads * -(-form.group // tile.block_m), form.segments)
    body = attention_body(form, tile, target, table_length)
    return text.build(body, grid, tile.num_warps, tile.num_stages, partial_bytes(form) if is_split else 0)


def _table_length(table: ArgSpec) -> str:
    """The step scalar that is the length of a block table's row."""
    length = table.shape[-1]
    if not isinstance(length, str) or table.stride(0) not in (length, f"({length})"):
        raise Refused(
            f"block_table is {table.shape} with strides {table.strides}: its rows must be contiguous, B_g long"
        )
    return length


def _add_constants(
    text: KernelText, tensors: dict[str, ArgSpec | None], form: AttentionForm, tile: AttentionTile
) -> None:
    q = tensors["q"]
    assert q is not None
    group_rows = min(form.group, tile.block_m)
    text.constants(BLOCK_M=tile.block_m, BLOCK_Q=1 if form.single_query else tile.block_m // group_rows)
    text.constants(TILE=tile.tile, GROUP=form.group, GROUP_ROWS=group_rows)
    if form.group > tile.block_m:
        text.constants(GROUP_BLOCKS=-(-form.group // tile.block_m))
    text.constants(K_DIM=form.k_dim, V_DIM=form.v_dim)
    text.constants(Q_TOKEN_STRIDE=q.int_stride(0), Q_HEAD_STRIDE=q.int_stride(1))
    for x in "k" if form.value_is_key_prefix else "kv":
        spec = tensors[f"kv_{x}" if form.block_size else x]
        assert spec is not None
        axes = ("BLOCK", "HEAD", "TOKEN") if form.block_size else ("TOKEN", "HEAD")
        text.constants(**{f"{x.upper()}_{axis}_STRIDE": spec.int_stride(i) for i, axis in enumerate(axes)})
    if form.block_size:
        text.constants(BLOCK_SIZE=form.block_size)
    if form.is_split:
        text.constants(SEGMENTS=form.segments, HEADS=form.kv_heads * form.group)
    else:
        text.constants(OUT_TOKEN_STRIDE=form.kv_heads * form.group * form.v_dim)
    text.constants(SCALE=float(text.call.attr("scale")), LOG2E=LOG2E)
    for name, value in (("WINDOW", form.window), ("CHUNK", form.chunk), ("SOFTCAP", form.softcap)):
        if value:
            text.constants(**{name: value})


def _form(call: Call, tensors: dict[str, ArgSpec | None], target: str) -> AttentionForm:
    """Sizes and rule of a launch, checked."""
    for i, name in enumerate(tensors):
        if name in _REQUIRED:
            call.tensor(i, name)
    is_paged = "kv_k" in tensors
    q, k, v, out = call.args[0], call.args[1], call.args[2], call.outputs[0]
    assert q is not None and k is not None and v is not None
    for name in ("block_table", "query_start_loc", "seq_lens"):
        spec = tensors.get(name)
        if spec is not None and spec.dtype != "int32":
            raise Refused(f"{name} must be int32, got {spec.dtype}")
    require_float(("q", q), *((name, tensors[name]) for name in _RULE))
    for name, spec in (("q", q), ("the keys", k), ("the values", v), ("the result", out)):
        require_unit_stride(spec, name)
    _check_dtypes(tensors, q, k, v, out, target)
    _check_sizes(call, q, k, v, out)
    segments = int(call.attrs.get("segments", 1))
    if not 1 <= segments <= MAX_SEGMENTS:
        raise Refused(f"segments is {segments}: 1 to {MAX_SEGMENTS} are possible")
    return AttentionForm(
        dtype=q.dtype,
        cache_dtype=k.dtype,
        out_dtype=out.dtype,
        kv_heads=k.int_dim(1),
        group=q.int_dim(1) // k.int_dim(1),
        k_dim=q.int_dim(2),
        v_dim=v.int_dim(-1),
        block_size=k.int_dim(2) if is_paged else 0,
        value_is_key_prefix=_value_is_key_prefix(call, k, v),
        causal=bool(call.attr("causal")),
        window=int(call.attr("window")),
        chunk=int(call.attr("chunk")),
        softcap=float(call.attr("softcap")),
        has_sinks=tensors["sinks"] is not None,
        has_alibi=tensors["alibi"] is not None,
        segments=segments,
        quantizes_rows=call.op == "paged_attention_quant_rows",
        single_query=call.attrs.get("max_query_len") == 1,
    )


def _check_dtypes(
    tensors: dict[str, ArgSpec | None], q: ArgSpec, k: ArgSpec, v: ArgSpec, out: ArgSpec, target: str
) -> None:
    if k.dtype != v.dtype or k.dtype not in (q.dtype, "float8_e4m3fn"):
        raise Refused(f"keys are {k.dtype}, values {v.dtype}: both must be {q.dtype}, as q is, or float8_e4m3fn")
    if out.dtype != q.dtype and not is_quantized(out.dtype):
        raise Refused(f"the result is {out.dtype}: it must be {q.dtype}, as q is, float8_e4m3fn or int8")
    if out.dtype == "float8_e4m3fn" and "out_scale" in tensors and lacks_e4m3(target):
        raise Refused(f"{target} has no float8_e4m3fn: quantize the result to int8")
    needed = {"k_scale": k.dtype != q.dtype, "v_scale": k.dtype != q.dtype}
    if "out_scale" in tensors:
        needed["out_scale"] = is_quantized(out.dtype)
    for name, is_needed in needed.items():
        spec = tensors.get(name)
        if (spec is not None) != is_needed:
            raise Refused(
                f"{name} is {'absent' if is_needed else 'given'}: {k.dtype} keys and a {out.dtype} result "
                f"{'need it' if is_needed else 'have none'}"
            )
        if spec is not None and (spec.dtype != "float32" or product(spec.shape) != 1):
            raise Refused(f"{name} must be one float32 number, got {spec.dtype} {spec.shape}")


def _check_sizes(call: Call, q: ArgSpec, k: ArgSpec, v: ArgSpec, out: ArgSpec) -> None:
    heads, kv_heads, v_dim = q.int_dim(1), k.int_dim(1), v.int_dim(-1)
    if k.shape[1:-1] != v.shape[1:-1]:
        raise Refused(f"keys {k.shape} and values {v.shape} must have the same heads and block size")
    if heads % kv_heads:
        raise Refused(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    if k.shape[-1] != q.shape[-1] or max(q.int_dim(2), v_dim) > MAX_HEAD_DIM:
        raise Refused(
            f"head sizes {q.shape[-1]} (q), {k.shape[-1]} (keys), {v_dim} (values): q's and the keys' must be "
            f"equal, none above {MAX_HEAD_DIM}"
        )
    if out.stride(-2) != heads * v_dim:
        raise Refused(f"the result must be contiguous, got strides {out.strides}")
    if call.attr("scale") <= 0:
        raise Refused(f"scale {call.attr('scale')} must be positive: the maximum is taken before it is applied")


def _value_is_key_prefix(call: Call, k: ArgSpec, v: ArgSpec) -> bool:
    if not call.attrs.get("value_is_key_prefix"):
        return False
    if [k.stride(i) for i in range(len(k.shape))] != [v.stride(i) for i in range(len(v.shape))]:
        raise Refused(f"values with strides {v.strides} are no view of keys with strides {k.strides}")
    least = 32 if ITEM_SIZES[k.dtype] == 1 else 16
    keys, values = head_parts(k.int_dim(-1), least), head_parts(v.int_dim(-1), least)
    if values != keys[: len(values)]:
        raise Refused(f"a value head of {v.int_dim(-1)} is no whole part of a key head of {k.int_dim(-1)}")
    return True
