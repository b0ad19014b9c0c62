"""Where rows of a tensor start, however its leading dimensions lie in memory (transposed, expanded, cut out)."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Refused, product, row_layout
from graphserve.kernels.triton.kernel import KernelText
from graphserve.kernels.triton.rows import RowProgram


def row_start(text: KernelText, name: str, spec: ArgSpec) -> str:
    """An int64 expression of the element at which row ``row`` of ``spec`` starts.

    ``KernelText.row_start`` where two constant strides tell; otherwise one term a dimension, in which sizes and strides
    may hold the step scalars that :func:`row_scalars` names.
    """
    if _has_row_layout(spec):
        return text.row_start(name, spec)
    axes = range(len(spec.shape) - 1)
    return " + ".join(_axis_offset(spec, axis) for axis in axes if spec.shape[axis] != 1 and spec.stride(axis) != 0)


def row_scalars(rows: RowProgram, specs: list[ArgSpec]) -> list[str]:
    """Step scalars that the program's masks and the starts of these tensors' rows read."""
    dims = [str(dim) for spec in specs if not _has_row_layout(spec) for dim in (*spec.shape, *(spec.strides or ()))]
    return [name for name in ("T", "R", "S") if name in rows.scalars or any(name in dim for dim in dims)]


def _axis_offset(spec: ArgSpec, axis: int) -> str:
    size, stride, inner = spec.shape[axis], spec.stride(axis), product(spec.shape[axis + 1 : -1])
    index = f"(row // ({inner}))" if inner != 1 else "row"
    if any(outer != 1 for outer in spec.shape[:axis]):
        index = f"({index} % ({size}))"
    return f"{index} * ({stride})"


def _has_row_layout(spec: ArgSpec) -> bool:
    try:
        row_layout(spec)
    except Refused:
        return False
    return True
