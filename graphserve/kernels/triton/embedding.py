"""Rows of a table by index: the token embedding, and the rows whose logits are wanted."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call, Refused, require_unit_stride
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, triton_type
from graphserve.kernels.triton.rows import RowProgram

# Columns of one program, as in ``activation``: a row is copied by several programs.
TILE = 1024


def embedding(call: Call, target: str) -> TritonKernel:
    """``(ids [*], weight [V, H])``."""
    return _gather(call, target, ids_at=0, table_at=1)


def gather_rows(call: Call, target: str) -> TritonKernel:
    """``(x [*, D], indices [R])``: the chosen rows of x, for the last rows before lm_head."""
    return _gather(call, target, ids_at=1, table_at=0)


def _gather(call: Call, target: str, ids_at: int, table_at: int) -> TritonKernel:
    ids, table, out = call.tensor(ids_at, "indices"), call.tensor(table_at, "table"), call.outputs[0]
    if ids.dtype not in ("int64", "int32"):
        raise Refused(f"indices must be int64 or int32, got {ids.dtype}")
    if triton_type(table) != triton_type(out):
        raise Refused(f"the table is {table.dtype}, the result {out.dtype}: they must be equal")
    require_unit_stride(ids, "indices")
    text = KernelText(call)
    text.pointer("x_ptr" if table_at == 0 else "ids_ptr", 0)
    text.pointer("x_ptr" if table_at == 1 else "ids_ptr", 1)
    text.output("out_ptr", 0)
    program = RowProgram(text, out, out.int_dim(-1), target, TILE)
    text.scalar(*program.scalars)
    body = [
        program.head,
        f"index = {program.load_row('ids_ptr')}.to(tl.int64)",
        f"value = {program.load('x_ptr', 'TABLE', table, row='index')}",
        program.store("out_ptr", "OUT", out, "value"),
    ]
    return text.build("\n".join(body), program.grid, program.num_warps)
