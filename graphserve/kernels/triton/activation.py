"""Activations and gated products, alone and followed by the quantization of their rows.

The gate of experts is part of their grouped product, see :mod:`graphserve.kernels.triton.moe`.
"""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Call, Refused
from graphserve.kernels.triton import expressions
from graphserve.kernels.triton.expressions import round_to, stored_type
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, require_float
from graphserve.kernels.triton.quantized_rows import QuantizedRows
from graphserve.kernels.triton.rows import MAX_WIDTH, RowProgram

# Columns of one program. Eight bf16 elements a thread of four warps, one 128-bit load of each argument: a decode
# step has few rows, and more but smaller programs spread over more processors.
TILE = 1024


def activation(call: Call, target: str) -> TritonKernel:
    """``gs.activation``: ``act(x)``."""
    text, x, out = KernelText(call), call.tensor(0, "x"), call.outputs[0]
    require_float(("x", x), ("output", out))
    program = RowProgram(text, x, x.int_dim(-1), target, TILE)
    text.pointer("x_ptr", 0)
    text.output("out_ptr", 0)
    text.scalar(*program.scalars)
    lines = [
        program.head,
        f"x = {program.load('x_ptr', 'X', x)}.to(tl.float32)",
        program.store("out_ptr", "OUT", out, expressions.activation(call.attr("act"), "x")),
    ]
    return text.build("\n".join(lines), program.grid, program.num_warps)


def act_mul(call: Call, target: str) -> TritonKernel:
    """``gs.act_mul``: ``act(gate) * up``; gate and up may be column slices of one buffer."""
    text = KernelText(call)
    gate, up = _gate_and_up(text)
    program = RowProgram(text, gate, gate.int_dim(-1), target, TILE)
    text.output("out_ptr", 0)
    text.scalar(*program.scalars)
    lines = [program.head, *_product(call, program, gate, up)]
    lines.append(program.store("out_ptr", "OUT", call.outputs[0], "product"))
    return text.build("\n".join(lines), program.grid, program.num_warps)


def act_mul_quant(call: Call, target: str) -> TritonKernel:
    """``gs.act_mul_quant``. A program computes rows longer than it can hold twice, tile by tile: for the largest value,
    and to write them (the arguments are then in the cache).
    """
    text, spec = KernelText(call), call.outputs[0]
    gate, up = _gate_and_up(text)
    width = gate.int_dim(-1)
    is_tiled = width > MAX_WIDTH
    program = RowProgram(text, gate, width, target, MAX_WIDTH // 2 if is_tiled else None)
    text.output("quantized_ptr", 0, stored_type(spec, target))
    text.output("scale_ptr", 1)
    text.scalar(*program.scalars)
    rows = QuantizedRows(text, program, spec, target)
    product, value = _product(call, program, gate, up), round_to(gate.dtype, "product")
    if is_tiled:
        lines = [program.row_head, *rows.tiled([*product, f"value = {value}"])]
    else:
        lines = [program.head, *product, *rows.whole(value)]
    return text.build("\n".join(lines), (program.grid[0], 1, 1), program.num_warps)


def _gate_and_up(text: KernelText) -> tuple[ArgSpec, ArgSpec]:
    gate, up = text.call.tensor(0, "gate"), text.call.tensor(1, "up")
    require_float(("gate", gate), ("up", up))
    if gate.int_dim(-1) != up.int_dim(-1):
        raise Refused(f"gate has {gate.shape[-1]} columns, up {up.shape[-1]}")
    text.pointer("gate_ptr", 0)
    text.pointer("up_ptr", 1)
    return gate, up


def _product(call: Call, program: RowProgram, gate: ArgSpec, up: ArgSpec) -> list[str]:
    """``product``, the activation rounded as its op rounds it."""
    value = expressions.activation(call.attr("act"), "gate")
    return [
        f"gate = {program.load('gate_ptr', 'GATE', gate)}.to(tl.float32)",
        f"up = {program.load('up_ptr', 'UP', up)}.to(tl.float32)",
        f"product = {value}",
        f"product = {round_to(gate.dtype, 'product')} * up",
    ]
