"""Entries of ``rms_norm``, ``layer_norm`` and their forms fused with the residual add."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Call, require_unit_stride
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


def _weight_type(weight: ArgSpec | None, bias: ArgSpec | None, default: str) -> str:
    present = [(name, spec) for name, spec in (("weight", weight), ("bias", bias)) if spec is not None]
    return require_same_dtype(*present) if present else default
