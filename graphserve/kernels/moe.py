"""Mixture of experts: routed rows through per-expert MLPs, cost by routed rows (N*K) and not by experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.kernels.activation import apply_activation
from graphserve.kernels.registry import register

CLAMPED_SWIGLU = "swiglu_clamp"


def gated(gate_up: Tensor, act: str, interleaved: bool, limit: float, alpha: float) -> Tensor:
    """The gate of one expert: ``gate_up [R, 2I] -> [R, I]``.

    Columns are ``[gate | up]``, or gate at even and up at odd columns when ``interleaved``. A ``limit`` above 0 clamps
    gate from above and up from both sides first. ``swiglu_clamp`` is ``(up + 1) * gate * sigmoid(alpha * gate)``.
    """
    gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, dim=-1)
    if limit > 0:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if act == CLAMPED_SWIGLU:
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return apply_activation(gate, act) * up


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
    transposed: bool,
    interleaved: bool,
    limit: float,
    alpha: float,
    has_gate: bool = True,
    weights_on_input: bool = False,
) -> Tensor:
    """Sum over the K experts of each row, weighted by the router.

    Args:
        x: ``[N, H]``.
        topk_ids: ``[N, K]`` int64; an id outside ``0..E-1`` adds nothing (expert parallelism's sentinel).
        topk_weights: ``[N, K]``.
        gate_up: ``[E, 2I, H]``, or ``[E, H, 2I]`` when ``transposed``; I instead of 2I without a gate.
        gate_up_bias: ``[E, 2I]`` or None.
        down: ``[E, H, I]``, or ``[E, I, H]`` when ``transposed``.
        down_bias: ``[E, H]`` or None.
        act: an activation of :mod:`graphserve.kernels.activation`, or ``swiglu_clamp``.
        transposed: weights are ``[in, out]``.
        interleaved: gate and up alternate by column.
        limit: see :func:`gated`; 0 for none.
        alpha: see :func:`gated`; read by ``swiglu_clamp`` only.
        has_gate: False for experts that are ``down(act(up(x)))``.
        weights_on_input: the router weight scales the expert's input instead of its output (Llama 4).

    Returns:
        ``[N, H]`` in ``x.dtype``; each expert's output is weighted in the wider of the two dtypes and the K
        terms are summed in fp32.
    """
    num_experts, top_k = gate_up.shape[0], topk_ids.shape[1]
    flat_ids, flat_weights = topk_ids.reshape(-1), topk_weights.reshape(-1)
    order = torch.argsort(flat_ids, stable=True)
    terms = x.new_zeros((flat_ids.shape[0], x.shape[1]), dtype=torch.promote_types(x.dtype, topk_weights.dtype))
    experts, counts = torch.unique_consecutive(flat_ids[order], return_counts=True)
    start = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        rows = order[start : start + count]
        start += count
        if not 0 <= expert < num_experts:
            continue
        hidden, row_weights = x[rows // top_k], flat_weights[rows, None]
        if weights_on_input:
            hidden = (hidden * row_weights).to(x.dtype)
        up_bias = None if gate_up_bias is None else gate_up_bias[expert]
        hidden = _expert_linear(hidden, gate_up[expert], up_bias, transposed)
        hidden = gated(hidden, act, interleaved, limit, alpha) if has_gate else apply_activation(hidden, act)
        hidden = _expert_linear(hidden, down[expert], None if down_bias is None else down_bias[expert], transposed)
        terms[rows] = (hidden if weights_on_input else hidden * row_weights).to(terms.dtype)
    return terms.view(x.shape[0], top_k, x.shape[1]).sum(dim=1, dtype=torch.float32).to(x.dtype)


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(x, weight.t() if transposed else weight, bias)


def _fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


register(
    "moe(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor? gate_up_bias, Tensor down,"
    " Tensor? down_bias, str act, bool transposed, bool interleaved, float limit, float alpha,"
    " bool has_gate=True, bool weights_on_input=False) -> Tensor",
    moe,
    _fake,
)
