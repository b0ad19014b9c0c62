"""Entries of ``rms_norm``, ``layer_norm`` and their forms fused with the residual add."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Call, Refused, require_unit_stride
from graphserve.kernels.cpu.entries import Entry, call_template, flag
from graphserve.kernels.cpu.kernel import NUM_THREADS, cpp_float, pointer, require_same_dtype, rows_of


def norm(call: Call) -> Entry:
    """Rows of the last dimension; with ``add_`` the sum is written too and must be laid out as the normed output."""
    adds = call.op.startswith("add_")
    x = call.tensor(0, "x")
    residual = call.tensor(1, "residual") if adds else None
    out, sum_out = call.outputs[0], call.outputs[1] if adds else None
    typed = [("x", x), ("output", out)]
    typed += [("residual", residual)] if residual else []
    typed += [("residual output", sum_out)] if sum_out else []
    cpp_type = require_same_dtype(*typed)
    for name, spec in typed:
        require_unit_stride(spec, name)
    base = 2 if adds else 1
    weight = call.optional(base)
    is_rms = call.op.endswith("rms_norm")
    bias = None if is_rms else call.optional(base + 1)
    weight_type = _weight_type(weight, bias, cpp_type)
    output_at = base + (1 if is_rms else 2)
    rows = rows_of(x)
    layout = [rows.cpp_type, rows_of(residual).cpp_type if residual else "Rows<1, 0, 0>", rows_of(out).cpp_type]
    pointers = [pointer(x, 0), pointer(residual, 1, cpp_type=cpp_type), pointer(weight, base, cpp_type=weight_type)]
    if not is_rms:
        pointers.append(pointer(bias, base + 1, cpp_type=weight_type))
    pointers.append(pointer(out, output_at, const=False))
    pointers.append(pointer(sum_out, output_at + 1, const=False, cpp_type=cpp_type))
    template_args = [cpp_type, weight_type, str(x.int_dim(-1)), flag(adds)]
    floats = [cpp_float(call.attr("eps"))]
    if is_rms:
        template_args.append(flag(call.attr("weight_fp32")))
        floats.append(cpp_float(call.attr("offset")))
    name = "rms_norm" if is_rms else "layer_norm"
    return Entry(("norm",), call_template(name, template_args + layout, [*pointers, rows.count, NUM_THREADS, *floats]))


def norm_add(call: Call) -> Entry:
    """``norm_add`` and ``norm_add_rms_norm``; sum and normed sum are laid out alike."""
    has_next = call.op == "norm_add_rms_norm"
    x, residual, total = call.tensor(0, "x"), call.tensor(2, "residual"), call.outputs[-1]
    typed = [("x", x), ("residual", residual), *(("output", spec) for spec in call.outputs)]
    cpp_type = require_same_dtype(*typed)
    for name, spec in typed:
        require_unit_stride(spec, name)
    post_weight, weight = call.optional(1), call.optional(3) if has_next else None
    weight_type = _weight_type(post_weight, weight, cpp_type)
    rows = rows_of(x)
    if any(rows_of(spec).cpp_type != rows_of(total).cpp_type for spec in call.outputs):
        raise Refused("the sum and its norm must have the same strides")
    first_output = 4 if has_next else 3
    template_args = [
        *(cpp_type, weight_type, str(x.int_dim(-1)), flag(call.attr("weight_fp32")), flag(has_next)),
        *(rows.cpp_type, rows_of(residual).cpp_type, rows_of(total).cpp_type),
    ]
    pointers = [
        *(pointer(x, 0), pointer(post_weight, 1, cpp_type=weight_type), pointer(residual, 2)),
        pointer(weight, 3, cpp_type=weight_type),
        pointer(call.outputs[0] if has_next else None, first_output, const=False, cpp_type=cpp_type),
        pointer(total, first_output + (1 if has_next else 0), const=False),
    ]
    post_eps = call.attr("post_eps" if has_next else "eps")
    floats = [cpp_float(post_eps), cpp_float(call.attr("eps")), cpp_float(call.attr("offset"))]
    return Entry(("norm",), call_template("norm_add", template_args, [*pointers, rows.count, NUM_THREADS, *floats]))


def _weight_type(weight: ArgSpec | None, bias: ArgSpec | None, default: str) -> str:
    present = [(name, spec) for name, spec in (("weight", weight), ("bias", bias)) if spec is not None]
    return require_same_dtype(*present) if present else default
