"""Entry of ``linear`` over a packed weight (see :mod:`graphserve.kernels.cpu.packing`)."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call, require_unit_stride
from graphserve.kernels.cpu.entries import Entry, call_template
from graphserve.kernels.cpu.kernel import NUM_THREADS, cpp_type_of, pointer, require_same_dtype, rows_of


def linear(call: Call) -> Entry:
    """``x @ weight.T + bias``; the weight's spec is ``[N, K]``, its pointer the packed form. Output may be fp32."""
    x, weight, bias, out = call.tensor(0, "x"), call.tensor(1, "weight"), call.optional(2), call.outputs[0]
    cpp_type = require_same_dtype(("x", x), ("weight", weight))
    bias_type = require_same_dtype(("bias", bias)) if bias is not None else cpp_type
    require_same_dtype(("output", out))
    require_unit_stride(x, "x")
    require_unit_stride(out, "output")
    rows = rows_of(x)
    template_args = [
        *(cpp_type, bias_type, cpp_type_of(out), str(weight.int_dim(1)), str(weight.int_dim(0))),
        *(rows.cpp_type, rows_of(out).cpp_type),
    ]
    pointers = [pointer(x, 0), "p[1]", pointer(bias, 2, cpp_type=bias_type), pointer(out, 3, const=False)]
    return Entry(("linear",), call_template("linear", template_args, [*pointers, rows.count, NUM_THREADS]))
