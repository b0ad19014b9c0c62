"""From an op with literal shapes to a C++ kernel, or the reason there is none."""

from __future__ import annotations

from typing import Any

from graphserve.kernels.arg_spec import ArgSpec, Call, Refusal, Refused
from graphserve.kernels.cpu import (
    activation,
    attention,
    concat,
    embedding,
    linear,
    moe,
    norm,
    pointwise,
    rope_kv,
    route,
)
from graphserve.kernels.cpu.entries import EntryGenerator
from graphserve.kernels.cpu.isa import ISA_LEVELS
from graphserve.kernels.cpu.kernel import CppKernel, make_kernel

GENERATORS: dict[str, EntryGenerator] = {
    "rms_norm": norm.norm,
    "add_rms_norm": norm.norm,
    "layer_norm": norm.norm,
    "add_layer_norm": norm.norm,
    "norm_add": norm.norm_add,
    "norm_add_rms_norm": norm.norm_add,
    "linear": linear.linear,
    "act_mul": activation.act_mul,
    "activation": activation.activation,
    "rope": rope_kv.rope,
    "kv_write": rope_kv.kv_write,
    "rope_kv_write": rope_kv.rope_kv_write,
    "paged_attention": attention.paged_attention,
    "moe": moe.moe,
    "concat": concat.concat,
    "route": route.route,
    "embedding": embedding.embedding,
    "gather_rows": embedding.gather_rows,
    "pointwise": pointwise.pointwise,
}


def generate(
    op: str, attrs: dict[str, Any], args: list[ArgSpec | None], outputs: list[ArgSpec], isa: str
) -> CppKernel | Refusal:
    """Generate the kernel of one launch.

    Args:
        op: op name, with or without the ``gs.`` prefix; ``gather_rows`` stands for an index_select of rows, ``concat``
            for a cat.
        attrs: the op's non-tensor arguments by name.
        args: its tensor arguments in schema order, None for absent ones. Weights of ``linear`` and ``moe`` are given
            by their unpacked spec; at run time the pointer is the packed form.
        outputs: its results in order.
        isa: a level of :data:`graphserve.kernels.cpu.isa.ISA_LEVELS`.

    Returns:
        The kernel, or a Refusal whose reason names what C++ kernels do not cover.

    Raises:
        ValueError: unknown ISA level.
    """
    if isa not in ISA_LEVELS:
        raise ValueError(f"ISA level {isa!r} is unknown: use one of {', '.join(ISA_LEVELS)}")
    name = op.removeprefix("gs.")
    if name not in GENERATORS:
        return Refusal(f"{op} has no C++ generator")
    try:
        entry = GENERATORS[name](Call(name, attrs, args, outputs))
    except Refused as refused:
        return Refusal(f"{op}: {refused}")
    lines = [f"{label}: {_describe(spec)}" for label, spec in _labelled(args, outputs)]
    lines += [f"{key} = {value!r}" for key, value in attrs.items()]
    return make_kernel(name, isa, ("prelude", *entry.families), "\n".join(lines), entry.body)


def _labelled(args: list[ArgSpec | None], outputs: list[ArgSpec]) -> list[tuple[str, ArgSpec | None]]:
    inputs = [(f"p[{i}] argument", spec) for i, spec in enumerate(args)]
    return inputs + [(f"p[{len(args) + i}] output", spec) for i, spec in enumerate(outputs)]


def _describe(spec: ArgSpec | None) -> str:
    if spec is None:
        return "absent"
    strides = "contiguous" if spec.strides is None else f"strides {list(spec.strides)}"
    return f"{spec.dtype} {list(spec.shape)} {strides}"
