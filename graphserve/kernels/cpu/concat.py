"""Entry of ``aten.cat``: each part is copied to its place."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Call, Dim, Refused, product
from graphserve.kernels.cpu import aten_text
from graphserve.kernels.cpu.entries import Entry
from graphserve.kernels.cpu.pointwise import FAMILIES, copy


def concat(call: Call) -> Entry:
    """``(parts ...)`` of one dtype joined over the attribute ``dim``; they may have any strides."""
    out = call.outputs[0]
    parts = [call.tensor(i, "part") for i in range(len(call.args))]
    axis = call.attrs.get("dim", 0) % len(out.shape)
    if out.dtype not in aten_text.STORAGE:
        raise Refused(f"parts of dtype {out.dtype} have no C++ form: only {', '.join(aten_text.STORAGE)}")
    around = (*out.shape[:axis], *out.shape[axis + 1 :])
    strides = tuple(out.stride(i) for i in range(len(out.shape)))
    lines: list[str] = []
    start = 0
    for number, part in enumerate(parts):
        if part.dtype != out.dtype or (*part.shape[:axis], *part.shape[axis + 1 :]) != around:
            raise Refused(f"a part is {part.dtype} {list(part.shape)}, the result {out.dtype} {list(out.shape)}")
        place = ArgSpec(out.dtype, part.shape, strides)
        offset: Dim = product((start, strides[axis])) if start else 0
        lines += ["  {", *copy(part, number, place, len(parts), offset), "  }"]
        # Only the last part may grow with the step: what follows it would start at a place that does.
        start += part.int_dim(axis) if number + 1 < len(parts) else 0
    return Entry(FAMILIES, "\n".join(lines))
