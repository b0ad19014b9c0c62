"""``aten.cat`` over the last dimension: the parts of a row side by side."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Call, Refused, product, require_unit_stride
from graphserve.kernels.triton.addresses import row_scalars, row_start
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, triton_type
from graphserve.kernels.triton.rows import RowProgram

# Columns of one program, as in ``activation``.
TILE = 1024


def concat(call: Call, target: str) -> TritonKernel:
    """``(parts [*, D_i] ...)``, attribute ``dim`` → ``[*, sum of D_i]``."""
    out = call.outputs[0]
    parts = [call.tensor(i, "part") for i in range(len(call.args))]
    if call.attr("dim") % len(out.shape) != len(out.shape) - 1:
        raise Refused(f"only the last dimension is joined, got dim {call.attr('dim')} of {len(out.shape)}")
    for spec in parts:
        require_unit_stride(spec, "a part")
        if triton_type(spec) != triton_type(out) or spec.shape[:-1] != out.shape[:-1]:
            raise Refused(f"a part is {spec.dtype} {list(spec.shape)}, the result {out.dtype} {list(out.shape)}")
    text = KernelText(call)
    for i in range(len(parts)):
        text.pointer(f"in{i}_ptr", i)
    text.output("out_ptr", 0)
    if not out.is_contiguous:
        raise Refused(f"the result must be contiguous, got strides {out.strides}")
    flat = ArgSpec(out.dtype, (product(out.shape[:-1]), out.int_dim(-1)))
    rows = RowProgram(text, flat, out.int_dim(-1), target, TILE)
    text.scalar(*row_scalars(rows, parts))
    lines = [rows.head, f"out = out_ptr + {row_start(text, 'OUT', flat)}"]
    start = 0
    for i, spec in enumerate(parts):
        end = start + spec.int_dim(-1)
        text.constants(**{f"START{i}": start, f"END{i}": end})
        inside = f"(column >= START{i}) & (column < END{i}){' & mask' if rows.is_masked else ''}"
        place = f"in{i}_ptr + {row_start(text, f'IN{i}', spec)} + (column - START{i})"
        lines += [
            f"inside = {inside}",
            f"part = tl.load({place}, mask=inside, other=0)",
            "tl.store(out + column, part, mask=inside)",
        ]
        start = end
    return text.build("\n".join(lines), rows.grid, rows.num_warps)
