"""Entry of ``moe`` over weights packed by :func:`graphserve.kernels.cpu.packing.pack_moe_weights`."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call, Refused, require_unit_stride
from graphserve.kernels.cpu.activation import cpp_activation
from graphserve.kernels.cpu.entries import Entry, flag
from graphserve.kernels.cpu.kernel import NUM_THREADS, cpp_float, pointer, require_same_dtype, rows_of
from graphserve.kernels.moe import CLAMPED_SWIGLU


def moe(call: Call) -> Entry:
    """Routed experts; specs of the weights are the unpacked ones, their pointers the packed forms."""
    names = ("x", "topk_ids", "topk_weights", "gate_up")
    x, ids, router, gate_up = (call.tensor(i, name) for i, name in enumerate(names))
    gate_up_bias, down, down_bias, out = call.optional(4), call.tensor(5, "down"), call.optional(6), call.outputs[0]
    cpp_type = require_same_dtype(("x", x), ("gate_up", gate_up), ("down", down), ("output", out))
    router_type = require_same_dtype(("topk_weights", router))
    for name, bias in (("gate_up_bias", gate_up_bias), ("down_bias", down_bias)):
        if bias is not None and bias.dtype != x.dtype:
            raise Refused(f"{name} is {bias.dtype} where x is {x.dtype}: they must be equal")
    if ids.dtype != "int64":
        raise Refused(f"topk_ids must be int64, got {ids.dtype}")
    for name, spec in (("x", x), ("output", out)):
        require_unit_stride(spec, name)
    for name, spec in (("topk_ids", ids), ("topk_weights", router)):
        if rows_of(spec).cpp_type not in (f"Rows<1, {spec.int_dim(-1)}, 0>", "Rows<1, 0, 0>"):
            raise Refused(f"{name} must be contiguous, got strides {spec.strides}")
    has_gate, on_input = call.attrs.get("has_gate", True), call.attrs.get("weights_on_input", False)
    inner = down.int_dim(1) if call.attr("transposed") else down.int_dim(2)
    act, limit = call.attr("act"), call.attr("limit")
    functor = "Identity" if act == CLAMPED_SWIGLU else cpp_activation(act)
    gate = "ClampedSwiglu" if act == CLAMPED_SWIGLU else f"PlainGate<{functor}>"
    if act == CLAMPED_SWIGLU and not has_gate:
        raise Refused(f"{CLAMPED_SWIGLU} needs experts with a gate")
    term_type = "bf16" if cpp_type == router_type == "bf16" else "float"
    rows = rows_of(x)
    template_args = [
        *(cpp_type, router_type, term_type, gate, functor),
        *map(str, (gate_up.int_dim(0), x.int_dim(-1), inner, ids.int_dim(-1))),
        *(flag(f) for f in (has_gate, call.attr("interleaved"), limit > 0, on_input)),
        *(rows.cpp_type, rows_of(out).cpp_type),
    ]
    fields = [
        *(pointer(x, 0), pointer(ids, 1), pointer(router, 2), "static_cast<const char*>(p[3])"),
        *(pointer(gate_up_bias, 4, cpp_type=cpp_type), "static_cast<const char*>(p[5])"),
        *(pointer(down_bias, 6, cpp_type=cpp_type), pointer(out, 7, const=False)),
        *(cpp_float(limit), cpp_float(call.attr("alpha"))),
    ]
    body = (
        f"  MixtureOfExperts<{', '.join(template_args)}> experts{{\n      {', '.join(fields)}}};\n"
        f"  experts.run({rows.count}, {NUM_THREADS});"
    )
    return Entry(("activation", "linear", "moe"), body)
