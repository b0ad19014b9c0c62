"""Entries of ``rope``, ``kv_write`` and ``rope_kv_write``."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Call, Refused, require_unit_stride
from graphserve.kernels.cpu.entries import Entry, call_template, flag
from graphserve.kernels.cpu.kernel import NUM_THREADS, cpp_dim, cpp_float, pointer, require_same_dtype

STYLES = {"half": "HALF", "interleaved": "INTERLEAVED", "interleaved_to_half": "INTERLEAVED_TO_HALF"}


def rope(call: Call) -> Entry:
    """Rotation of ``[1, H, T, D]`` or ``[1, T, H, D]``; strides may depend on T."""
    x, cos, sin, out = call.tensor(0, "x"), call.tensor(1, "cos"), call.tensor(2, "sin"), call.outputs[0]
    cpp_type, table_type = require_same_dtype(("x", x), ("output", out)), require_same_dtype(("cos", cos), ("sin", sin))
    if len(x.shape) != 4 or x.shape[0] != 1:
        raise Refused(f"rope takes [1, H, T, D] or [1, T, H, D], got {x.shape}")
    for name, spec in (("x", x), ("cos", cos), ("sin", sin), ("output", out)):
        require_unit_stride(spec, name)
    token, head = (2, 1) if call.attr("heads_first") else (1, 2)
    strides = [x.stride(token), x.stride(head), cos.stride(-2), sin.stride(-2), out.stride(token), out.stride(head)]
    template_args = [cpp_type, table_type, _style(call), str(x.int_dim(3)), str(cos.int_dim(-1))]
    pointers = [pointer(x, 0), pointer(cos, 1), pointer(sin, 2), pointer(out, 3, const=False)]
    numbers = [cpp_dim(dim) for dim in (x.shape[token], x.shape[head], *strides)]
    return Entry(("rope_kv",), call_template("rope", template_args, [*pointers, *numbers, NUM_THREADS]))


def kv_write(call: Call) -> Entry:
    """Keys and values into their slots."""
    k, v, kv_k, kv_v, slots = (call.tensor(i, n) for i, n in enumerate(("k", "v", "kv_k", "kv_v", "slot_mapping")))
    body = _write_entry(
        call, q=None, k=k, v=v, cache=(kv_k, kv_v), tables=(None, None), norms=(None, None), style="HALF",
        weight_fp32=False, slots=slots, positions=None,
        at=(-1, 0, 1, -1, -1, -1, -1, -1, 2, 3, 4, -1), floats=("0.0f", "0.0f"),
    )  # fmt: skip
    return Entry(("rope_kv",), body)


def rope_kv_write(call: Call) -> Entry:
    """Per-head norm, rotation, cache write."""
    names = ("q", "k", "v", "cos_table", "sin_table", "positions", "q_norm", "k_norm", "kv_k", "kv_v", "slot_mapping")
    optional = {"cos_table", "sin_table", "q_norm", "k_norm"}
    q, k, v, cos, sin, positions, q_norm, k_norm, kv_k, kv_v, slots = (
        call.optional(i) if name in optional else call.tensor(i, name) for i, name in enumerate(names)
    )
    assert k is not None and v is not None and kv_k is not None and kv_v is not None and slots is not None
    body = _write_entry(
        call, q=q, k=k, v=v, cache=(kv_k, kv_v), tables=(cos, sin), norms=(q_norm, k_norm), style=_style(call),
        weight_fp32=call.attr("weight_fp32"), slots=slots, positions=positions, at=tuple(range(12)),
        floats=(cpp_float(call.attr("eps")), cpp_float(call.attr("offset"))),
    )  # fmt: skip
    return Entry(("rope_kv",), body)


def _write_entry(
    call: Call,
    q: ArgSpec | None,
    k: ArgSpec,
    v: ArgSpec,
    cache: tuple[ArgSpec, ArgSpec],
    tables: tuple[ArgSpec | None, ArgSpec | None],
    norms: tuple[ArgSpec | None, ArgSpec | None],
    style: str,
    weight_fp32: bool,
    slots: ArgSpec,
    positions: ArgSpec | None,
    at: tuple[int, ...],
    floats: tuple[str, str],
) -> str:
    kv_k, kv_v = cache
    cos, sin = tables
    heads = [spec for spec in (("q", q), ("k", k), ("v", v)) if spec[1] is not None]
    cpp_type = require_same_dtype(*heads)  # type: ignore[arg-type]
    cache_type = require_same_dtype(("kv_k", kv_k), ("kv_v", kv_v))
    for name, spec in (("q", q), ("k", k), ("v", v), ("kv_k", kv_k), ("kv_v", kv_v), ("cos", cos), ("sin", sin)):
        if spec is not None:
            require_unit_stride(spec, name)
    for name, spec in (("slot_mapping", slots), ("positions", positions)):
        if spec is not None and spec.dtype != "int64":
            raise Refused(f"{name} must be int64, got {spec.dtype}")
    if (cos is None) != (sin is None):
        raise Refused("cos_table and sin_table must both be given or both be absent")
    present_norms = [("norm weight", spec) for spec in norms if spec is not None]
    norm_type = require_same_dtype(*present_norms) if present_norms else cpp_type
    table_type = require_same_dtype(("cos_table", cos), ("sin_table", sin)) if cos and sin else "float"
    dim = k.int_dim(2)
    if q is not None and q.int_dim(2) != dim:
        raise Refused(f"q and k heads differ: {q.int_dim(2)} and {dim}")
    strides: list[int] = []
    for spec in (q, k, v):
        strides += [spec.int_stride(0), spec.int_stride(1)] if spec is not None else [0, 0]
    numbers = [
        *(q.int_dim(1) if q is not None else 0, k.int_dim(1), dim, v.int_dim(2), cos.int_dim(1) if cos else 0),
        *(kv_k.int_dim(2), kv_k.int_stride(0), kv_v.int_stride(0), *strides),
        *(cos.int_stride(0) if cos else 0, sin.int_stride(0) if sin else 0),
    ]
    template_args = [cpp_type, cache_type, table_type, norm_type, style, flag(weight_fp32), *map(str, numbers)]
    pointers = [
        pointer(q, at[0], cpp_type=cpp_type), pointer(k, at[1]), pointer(v, at[2]),
        pointer(cos, at[3], cpp_type=table_type), pointer(sin, at[4], cpp_type=table_type),
        pointer(positions, at[5], cpp_type="int64_t"),
        pointer(norms[0], at[6], cpp_type=norm_type), pointer(norms[1], at[7], cpp_type=norm_type),
        pointer(kv_k, at[8], const=False), pointer(kv_v, at[9], const=False), pointer(slots, at[10]),
        pointer(q, at[11], const=False, cpp_type=cpp_type),
    ]  # fmt: skip
    args = [*pointers, cpp_dim(k.shape[0]), NUM_THREADS, *floats]
    return call_template("rope_kv_write", template_args, args)


def _style(call: Call) -> str:
    style = call.attr("style")
    if style not in STYLES:
        raise Refused(f"rope style {style!r} has no C++ form: only {', '.join(STYLES)}")
    return STYLES[style]
