"""Entries of ``act_mul`` and ``activation``."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Call, Refused, require_unit_stride
from graphserve.kernels.cpu.entries import Entry, call_template
from graphserve.kernels.cpu.kernel import NUM_THREADS, pointer, require_same_dtype, rows_of

CPP_ACTIVATIONS = {
    "silu": "Silu",
    "gelu": "Gelu",
    "gelu_tanh": "GeluTanh",
    "relu": "Relu",
    "relu2": "Relu2",
    "sigmoid": "Sigmoid",
    "quick_gelu": "QuickGelu",
    "none": "Identity",
}


def cpp_activation(act: str) -> str:
    """The functor of an activation name."""
    if act not in CPP_ACTIVATIONS:
        raise Refused(f"activation {act!r} has no C++ form: only {', '.join(CPP_ACTIVATIONS)}")
    return CPP_ACTIVATIONS[act]


def act_mul(call: Call) -> Entry:
    """``act(gate) * up``; gate and up may be column slices of one buffer."""
    gate, up, out = call.tensor(0, "gate"), call.tensor(1, "up"), call.outputs[0]
    return _rowwise(call, "act_mul", [("gate", gate), ("up", up), ("output", out)])


def activation(call: Call) -> Entry:
    """``act(x)``."""
    return _rowwise(call, "activation", [("x", call.tensor(0, "x")), ("output", call.outputs[0])])


def _rowwise(call: Call, name: str, tensors: list[tuple[str, ArgSpec]]) -> Entry:
    cpp_type = require_same_dtype(*tensors)
    for label, spec in tensors:
        require_unit_stride(spec, label)
    rows = [rows_of(spec) for _, spec in tensors]
    template_args = [cpp_type, cpp_activation(call.attr("act")), str(tensors[0][1].int_dim(-1))]
    last = len(tensors) - 1
    pointers = [pointer(spec, i, const=i < last) for i, (_, spec) in enumerate(tensors)]
    body = call_template(name, [*template_args, *(r.cpp_type for r in rows)], [*pointers, rows[0].count, NUM_THREADS])
    return Entry(("activation",), body)
