"""``gs.quantize_rows`` alone, for activations that no norm or activation kernel makes."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call
from graphserve.kernels.triton.expressions import stored_type
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, require_float
from graphserve.kernels.triton.quantized_rows import QuantizedRows
from graphserve.kernels.triton.rows import MAX_WIDTH, RowProgram


def quantize_rows(call: Call, target: str) -> TritonKernel:
    """A program takes whole rows; one that cannot hold a row reads it twice, for the largest value and to write it."""
    text, x, spec = KernelText(call), call.tensor(0, "x"), call.outputs[0]
    require_float(("x", x))
    width = x.int_dim(-1)
    is_tiled = width > MAX_WIDTH
    program = RowProgram(text, x, width, target, MAX_WIDTH // 2 if is_tiled else None)
    text.pointer("x_ptr", 0)
    text.output("quantized_ptr", 0, stored_type(spec, target))
    text.output("scale_ptr", 1)
    text.scalar(*program.scalars)
    rows = QuantizedRows(text, program, spec, target)
    load = f"{program.load('x_ptr', 'X', x)}.to(tl.float32)"
    if is_tiled:
        lines = [program.row_head, *rows.tiled([f"value = {load}"])]
    else:
        lines = [program.head, *rows.whole(load)]
    return text.build("\n".join(lines), (program.grid[0], 1, 1), program.num_warps)
