"""Entries of ``embedding`` and of the row gather before the last linear."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call, Refused, product, require_unit_stride
from graphserve.kernels.cpu.entries import Entry, call_template
from graphserve.kernels.cpu.kernel import NUM_THREADS, cpp_dim, cpp_type_of, pointer, require_same_dtype, rows_of


def embedding(call: Call) -> Entry:
    """``(ids, weight)``; with the attribute ``packed`` the weight's pointer is the packed form of a tied lm_head."""
    return _gather(call, ids_at=0, table_at=1)


def gather_rows(call: Call) -> Entry:
    """``(x [*, D], indices [R])``: the chosen rows of x, for the last rows before lm_head."""
    return _gather(call, ids_at=1, table_at=0)


def _gather(call: Call, ids_at: int, table_at: int) -> Entry:
    ids, table, out = call.tensor(ids_at, "indices"), call.tensor(table_at, "table"), call.outputs[0]
    cpp_type = require_same_dtype(("table", table), ("output", out))
    if ids.dtype not in ("int64", "int32"):
        raise Refused(f"indices must be int64 or int32, got {ids.dtype}")
    for name, spec in (("indices", ids), ("table", table), ("output", out)):
        require_unit_stride(spec, name)
    template_args = [cpp_type, cpp_type_of(ids), str(table.int_dim(-1))]
    tail = [pointer(ids, ids_at), pointer(out, 2, const=False), cpp_dim(product(ids.shape)), NUM_THREADS]
    if call.attrs.get("packed", False):
        args = [f"static_cast<const char*>(p[{table_at}])", *tail]
        body = call_template("gather_packed_rows", [*template_args, rows_of(out).cpp_type], args)
    else:
        layout = [rows_of(table).cpp_type, rows_of(out).cpp_type]
        body = call_template("gather_rows", [*template_args, *layout], [pointer(table, table_at), *tail])
    return Entry(("embedding",), body)
