"""Mixture-of-experts layers as one node: our function in `transformers`' ``ExpertsInterface``.

`transformers` keeps expert weights as 3D parameters and lets an implementation be chosen by name. Ours calls
``gs.moe``. What the layer computes between its two projections lives in ``module._apply_gate`` (Python), so it is
*identified by running it* on random numbers and comparing with the forms that ``gs.moe`` knows; an unknown form is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from graphserve.compiler.refusals import MARKER

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
}


def register_experts(name: str) -> None:
    """Register our experts function under ``name`` (idempotent)."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(name, graphserve_experts)


def graphserve_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts function for `transformers`: one ``gs.moe`` node.

    Args:
        hidden_states: [N, H]; top_k_index: [N, K] int64; top_k_weights: [N, K].
    """
    description: Any = module.graphserve_activation
    act, limit, alpha, refusal = description
    if refusal:
        raise RuntimeError(f"{MARKER}{refusal}")
    has_gate = module.has_gate
    up = module.gate_up_proj if has_gate else module.up_proj
    up_bias = None
    down_bias = None
    if module.has_bias:
        up_bias = module.gate_up_proj_bias if has_gate else module.up_proj_bias
        down_bias = module.down_proj_bias
    return torch.ops.gs.moe(
        hidden_states,
        top_k_index,
        top_k_weights,
        up,
        up_bias,
        module.down_proj,
        down_bias,
        act,
        module.is_transposed,
        not module.is_concatenated,
        limit,
        alpha,
        has_gate,
    )


def describe_experts(model: nn.Module) -> None:
    """Set ``graphserve_activation = (act, limit, alpha, refusal)`` on every experts module of ``model``."""
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "has_gate"):
            module.graphserve_activation = _identify(name, module)


def _identify(name: str, module: Any) -> tuple[str, float, float, str]:
    if getattr(module, "has_post_expert_norm", False):
        return "", 0.0, 0.0, f"{name}: experts with a norm after each expert"
    generator = torch.Generator().manual_seed(0)
    # Small and large numbers: a clamp shows only beyond its limit.
    scales = torch.tensor([0.1, 3.0, 100.0, 1e4])[:, None]
    if not module.has_gate:
        x = scales * torch.randn(4, 64, generator=generator)
        found = next((a for a, f in _ACTIVATIONS.items() if torch.allclose(module.act_fn(x), f(x), atol=1e-6)), None)
        return (found, 0.0, 0.0, "") if found else ("", 0.0, 0.0, f"{name}: unknown expert activation")
    merged = scales * torch.randn(4, 128, generator=generator)
    result = module._apply_gate(merged)
    if module.is_concatenated:
        gate, up = merged.chunk(2, dim=-1)
    else:
        gate, up = merged[..., ::2], merged[..., 1::2]
    for act, function in _ACTIVATIONS.items():
        if torch.allclose(result, function(gate) * up, atol=1e-5):
            return act, 0.0, 0.0, ""
    limit, alpha = getattr(module, "limit", None), getattr(module, "alpha", None)
    if limit is not None:
        low, high = gate.clamp(max=limit), up.clamp(-limit, limit)
        if alpha is not None and torch.allclose(result, (high + 1) * low * torch.sigmoid(alpha * low), atol=1e-5):
            return "swiglu_clamp", float(limit), float(alpha), ""
    return "", 0.0, 0.0, f"{name}: unknown expert activation ({type(module).__name__}._apply_gate)"
