"""Rotary frequencies fixed for the served length.

Dynamic-NTK and LongRoPE modules recompute their frequencies in every forward pass from ``max(position_ids)``. Requests
of a batch share one forward pass here, so one long request would change the others' answers. As in other servers the
frequencies are chosen once, from the longest sequence that will be served.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from graphserve.errors import UnsupportedModelError

STATIC = "static"  # not a transformers RoPE type: none of its per-step updates applies to it
BAKED_ATTRIBUTE = "_graphserve_baked_buffers"
ORIGINAL_TYPE_ATTRIBUTE = "_graphserve_rope_type"


def bake_rope(model: nn.Module, max_model_len: int) -> None:
    """Make every rotary module of a model static, in place.

    * LongRoPE (Ding et al. 2024): the long factors when ``max_model_len`` exceeds the trained length, else the short
      ones; the attention scaling is transformers' own.
    * Dynamic NTK: the base for ``max_model_len`` when that exceeds ``max_position_embeddings``, else the trained one.
    * Modules whose forward pass recomputes the frequencies each time (Phi-3.5-MoE) read their buffer instead.

    Other rotary modules are left as they are. Idempotent for one length.

    Args:
        model: any device; buffers of a model on meta stay there, their values are read by non_persistent_buffers.
        max_model_len: tokens of the longest sequence.

    Raises:
        UnsupportedModelError: a module changes its frequencies at run time by a rule that is not known here.
    """
    for name, module in model.named_modules():
        rope_type = getattr(module, ORIGINAL_TYPE_ATTRIBUTE, getattr(module, "rope_type", None))
        if hasattr(module, "rope_init_fn") and isinstance(rope_type, str) and hasattr(module, "inv_freq"):
            _bake_recomputing(module, rope_type, max_model_len)
        elif isinstance(rope_type, str) and _is_dynamic(rope_type):
            _remember_type(module, rope_type)
            _bake(name, module, None, rope_type, max_model_len)
            module.rope_type = STATIC
        elif isinstance(rope_type, dict) and any(map(_is_dynamic, rope_type.values())):
            _remember_type(module, rope_type)
            for layer_type, kind in rope_type.items():
                if _is_dynamic(kind):
                    _bake(name, module, layer_type, kind, max_model_len)
            module.rope_type = {key: STATIC if _is_dynamic(kind) else kind for key, kind in rope_type.items()}


def baked_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Values that bake_rope chose for a module's own buffers, by buffer name."""
    return getattr(module, BAKED_ATTRIBUTE, {})


def original_rope_type(module: nn.Module) -> Any:
    """The module's RoPE type before bake_rope, or None when it was not baked."""
    return getattr(module, ORIGINAL_TYPE_ATTRIBUTE, None)


def _is_dynamic(rope_type: str) -> bool:
    return rope_type == "longrope" or "dynamic" in rope_type


def _remember_type(module: nn.Module, rope_type: Any) -> None:
    setattr(module, ORIGINAL_TYPE_ATTRIBUTE, rope_type)


def _set_value(module: nn.Module, buffer: str, value: torch.Tensor) -> None:
    """Record a buffer's value, and store it where the buffer is not on meta."""
    current = module._buffers[buffer]
    assert current is not None
    value = value.to(dtype=current.dtype)
    setattr(module, BAKED_ATTRIBUTE, {**baked_buffers(module), buffer: value})
    if current.device.type != "meta":
        module._buffers[buffer] = value.to(current.device)


def _bake(name: str, module: Any, layer_type: str | None, rope_type: str, max_model_len: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
    if rope.get("alpha"):
        return  # a fixed NTK alpha: the frequencies do not depend on the length, only the per-step update is dropped
    if rope_type not in ROPE_INIT_FUNCTIONS:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}): RoPE type {rope_type!r} changes with the batch and is not known; "
            f"known: {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
        )
    options = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](
        module.config, torch.device("cpu"), seq_len=max_model_len, **options
    )
    prefix = "" if layer_type is None else f"{layer_type}_"
    _set_value(module, f"{prefix}inv_freq", inv_freq)
    setattr(module, f"{prefix}attention_scaling", scaling)


def _bake_recomputing(module: Any, rope_type: str, max_model_len: int) -> None:
    """A module that calls ``rope_init_fn`` in forward and picks ``short_mscale`` or ``long_mscale`` by length."""
    _remember_type(module, rope_type)
    rope = module.config.rope_parameters
    inv_freq, scaling = module.rope_init_fn(module.config)
    if rope_type != "default":
        is_long = max_model_len > rope["original_max_position_embeddings"]
        scaling = rope["long_mscale" if is_long else "short_mscale"]
    _set_value(module, "inv_freq", inv_freq)
    module.attention_scaling = scaling
    module.forward = types.MethodType(_static_forward, module)


@torch.no_grad()
def _static_forward(
    self: Any, x: torch.Tensor, position_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[B, T, rotary_dim]`` in x's dtype for ``position_ids [B, T]``, from the module's own buffer."""
    assert position_ids is not None
    frequencies = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
    angles = torch.cat((frequencies, frequencies), dim=-1)
    return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)
