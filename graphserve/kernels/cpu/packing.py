"""Weight layout of the matrix kernels: panels of 16 output columns, the same at every ISA level.

bf16 ``[N/16, K/2, 16, 2]`` (pairs of inputs side by side, as vdpbf16ps reads them), fp32 ``[N/16, K, 16]``; N and odd
K are padded with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 16


def packed_shape(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the packed form of a ``[rows, columns]`` weight (out, in).

    Raises:
        ValueError: dtype is neither float32 nor bfloat16.
    """
    panels = -(-rows // PANEL)
    if dtype == torch.bfloat16:
        return (panels, -(-columns // 2), PANEL, 2)
    if dtype == torch.float32:
        return (panels, columns, PANEL)
    raise ValueError(f"weights of dtype {dtype} cannot be packed: use torch.float32 or torch.bfloat16")


def pack_linear_weight(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Pack ``weight [N, K]`` (any strides); ``out`` takes the result when given. Reads and writes each byte once."""
    rows, columns = weight.shape
    shape = packed_shape(rows, columns, weight.dtype)
    packed = weight.new_empty(shape) if out is None else out
    pairs = 2 if weight.dtype == torch.bfloat16 else 1
    if rows % PANEL or columns % pairs:
        padded = weight.new_zeros((shape[0] * PANEL, shape[1] * pairs))
        padded[:rows, :columns] = weight
        weight = padded
    if pairs == 2:
        packed.copy_(weight.reshape(shape[0], PANEL, shape[1], 2).transpose(1, 2))
    else:
        packed.copy_(weight.reshape(shape[0], PANEL, shape[1]).transpose(1, 2))
    return packed


def unpack_linear_weight(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The ``[rows, columns]`` weight a packed tensor holds."""
    return packed.transpose(1, 2).reshape(packed.shape[0] * PANEL, -1)[:rows, :columns].contiguous()


def pack_moe_weights(
    gate_up: Tensor, down: Tensor, transposed: bool, interleaved: bool, has_gate: bool = True
) -> tuple[Tensor, Tensor]:
    """Pack the weights of ``gs.moe`` (shapes there), one expert at a time.

    Panels of the first weight alternate: 16 gate columns, the 16 up columns that go with them, and so on.
    """
    num_experts = gate_up.shape[0]
    width = gate_up.shape[2] if transposed else gate_up.shape[1]
    hidden = gate_up.shape[1] if transposed else gate_up.shape[2]
    inner = width // 2 if has_gate else width
    up_shape, down_shape = packed_shape(inner, hidden, gate_up.dtype), packed_shape(hidden, inner, down.dtype)
    kinds = 2 if has_gate else 1
    packed_up = gate_up.new_empty((num_experts, up_shape[0], kinds, *up_shape[1:]))
    packed_down = down.new_empty((num_experts, *down_shape))
    for expert in range(num_experts):
        first = gate_up[expert].t() if transposed else gate_up[expert]
        halves = [first] if not has_gate else [first[::2], first[1::2]] if interleaved else list(first.chunk(2))
        for kind, half in enumerate(halves):
            packed_up[expert, :, kind] = pack_linear_weight(half)
        pack_linear_weight(down[expert].t() if transposed else down[expert], packed_down[expert])
    return packed_up, packed_down
