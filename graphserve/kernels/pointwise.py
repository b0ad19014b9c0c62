"""A group of elementwise ATen calls as one op, for what no named op covers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphserve.kernels.pointwise_program import PointwiseProgram, is_value, literal
from graphserve.kernels.registry import register


def pointwise(inputs: list[Tensor], program: str) -> list[Tensor]:
    """Run a program on its inputs, one ATen call after another.

    Args:
        inputs: tensors that broadcast against one another.
        program: see :class:`graphserve.kernels.pointwise_program.PointwiseProgram`.

    Returns:
        The program's results, contiguous.

    Raises:
        ValueError: the program is malformed, takes another number of inputs or names an op that is no ATen op.
    """
    parsed = PointwiseProgram.decode(program)
    if len(inputs) != parsed.num_inputs:
        raise ValueError(f"the program takes {parsed.num_inputs} inputs, got {len(inputs)}")
    values: list[Tensor] = list(inputs)
    for instruction in parsed.instructions:
        args = [_resolve(a, values) for a in instruction.args]
        kwargs = {name: _resolve(a, values) for name, a in instruction.kwargs.items()}
        result = _overload(instruction.op)(*args, **kwargs)
        if result.dtype != getattr(torch, instruction.dtype):
            raise ValueError(f"{instruction} gave {result.dtype}")
        values.append(result)
    return [values[i].clone(memory_format=torch.contiguous_format) for i in parsed.results]


def _resolve(argument: Any, values: list[Tensor]) -> Any:
    if is_value(argument):
        return values[argument["v"]]
    if isinstance(argument, dict) and "dtype" in argument:
        return getattr(torch, argument["dtype"])
    return literal(argument)


def _overload(name: str) -> Any:
    namespace, packet, overload = (name.split(".") + ["", ""])[:3]
    if namespace != "aten" or not hasattr(torch.ops.aten, packet):
        raise ValueError(f"{name!r} is no ATen op: write aten.<name>.<overload>")
    return getattr(getattr(torch.ops.aten, packet), overload)


register("pointwise(Tensor[] inputs, str program) -> Tensor[]", pointwise, pointwise)
