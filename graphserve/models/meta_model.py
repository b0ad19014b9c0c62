"""The model without weights: transformers' module tree on the meta device, and the buffers that weights do not fill."""

from __future__ import annotations

import copy
import logging
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from graphserve.errors import UnsupportedModelError
from graphserve.models.rope import baked_buffers, original_rope_type

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def build_meta_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str = "graphserve",
    experts_implementation: str = "graphserve",
) -> PreTrainedModel:
    """Build a causal language model on the meta device, in eval mode, without initialising anything.

    Args:
        config: from config.load_config; not modified.
        dtype: dtype of the parameters; those that the model class insists on keep float32.
        attn_implementation: name registered with ``transformers.AttentionInterface``.
        experts_implementation: name registered with ``transformers.ExpertsInterface``, for models that have experts.

    Returns:
        The model. Tied parameters are one object. Cost: no weight memory; 0.1-2 s for published sizes.

    Raises:
        UnsupportedModelError: the model class does not take the attention or experts implementation.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    start = time.perf_counter()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                experts_implementation=experts_implementation,
                trust_remote_code=False,
            )
    except (ValueError, ImportError, NotImplementedError, AttributeError, TypeError, KeyError) as error:
        if error.args == (attn_implementation,):
            # Classes that pick their attention from a table of their own, which holds no registered name.
            reason = "its attention does not go through transformers' AttentionInterface"
        else:
            reason = (
                f"transformers cannot build it with attn_implementation={attn_implementation!r}, "
                f"experts_implementation={experts_implementation!r}: {error}"
            )
        raise UnsupportedModelError(f"{config.model_type}: {reason}") from error
    _keep_float32(model, dtype)
    model.eval().requires_grad_(False)
    logger.debug("built %s on meta in %.2f s", type(model).__name__, time.perf_counter() - start)
    return model


def non_persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Values of every buffer that no checkpoint holds (RoPE frequencies, embedding scales, position ids, ...).

    transformers, too, builds models on the meta device and computes such buffers afterwards in ``_init_weights``; this
    runs the same code on CPU, for the modules that own such buffers only. Values chosen by bake_rope take precedence.
    The model is left on meta.

    Returns:
        ``{name: CPU tensor}``, dtype as in the model.

    Raises:
        UnsupportedModelError: names the buffers that nothing computes.
    """
    values: dict[str, torch.Tensor] = {}
    uncovered: list[str] = []
    for prefix, module, owner in _modules_with_owner(model):
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        if not names:
            continue
        # A buffer is covered when two initialisations over different contents agree: whatever it held was replaced.
        first, second = _initialize(module, owner, names, fill=0), _initialize(module, owner, names, fill=1)
        for name in sorted(names):
            full_name = f"{prefix}.{name}" if prefix else name
            if name in baked_buffers(module):
                values[full_name] = baked_buffers(module)[name]
            elif torch.equal(first[name], second[name]):
                values[full_name] = first[name]
            else:
                uncovered.append(full_name)
    if uncovered:
        raise UnsupportedModelError(
            f"{type(model).__name__}: transformers' _init_weights does not compute the buffers "
            f"{', '.join(uncovered[:5])}{' ...' if len(uncovered) > 5 else ''}, which no checkpoint holds either"
        )
    return values


def _initialize(module: nn.Module, owner: PreTrainedModel, names: list[str], fill: int) -> dict[str, torch.Tensor]:
    """Run ``_init_weights`` for one module with its non-persistent buffers on CPU, filled with ``fill`` beforehand."""
    buffers = dict(module._buffers)
    rope_type = getattr(module, "rope_type", None)
    try:
        if original_rope_type(module) is not None:
            module.rope_type = original_rope_type(module)
        for name in names:
            meta = buffers[name]
            assert meta is not None
            module._buffers[name] = torch.full(meta.shape, fill, dtype=meta.dtype, device="cpu")
        with torch.no_grad():
            owner._init_weights(module)
        return {name: value for name in names if (value := module._buffers[name]) is not None}
    finally:
        module._buffers.update(buffers)
        if rope_type is not None:
            module.rope_type = rope_type


def _modules_with_owner(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Every module with its path and the innermost PreTrainedModel around it, whose ``_init_weights`` is in charge."""
    from transformers import PreTrainedModel

    def walk(
        prefix: str, module: nn.Module, owner: PreTrainedModel
    ) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
        yield prefix, module, owner
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            yield from walk(path, child, child if isinstance(child, PreTrainedModel) else owner)

    yield from walk("", model, model)


def _keep_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give float32 to the parameters that the model class keeps there when loaded in a half dtype."""
    patterns = [pattern for pattern, kept in model._get_dtype_plan(dtype).items() if kept == torch.float32]
    if not patterns:
        return
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for name, tensor in list(model.state_dict(keep_vars=True).items()):
        if kept.search(name) and tensor.dtype.is_floating_point:
            # `.data` keeps the Parameter object, and with it ties.
            tensor.data = tensor.data.to(torch.float32)
