"""Derive each attention layer's rule from the model itself, while it is being traced.

`transformers` keeps the visibility rule (causal, sliding window, chunked, bidirectional overlays) in mask tensors made
by the functions of ``masking_utils``. Masks never enter our graph, so during the trace those functions are replaced by
recorders which return a *rule string* instead of a tensor. The string travels through the unmodified model to the
attention call, which tells exactly which layer got which rule. A model that computes with its mask fails to trace with
a string and is refused by name; nothing is assumed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

_PREFIX = "graphserve-rule"
# Arguments of the mask functions that add to the rule or take from it.
_OVERLAYS = ("or_mask_function", "and_mask_function", "block_sequence_ids")


class AttentionRule(NamedTuple):  # a tuple of plain values: Dynamo traces through the functions below
    """Which keys a query sees. Query at position i, key at position j of the same request.

    ``causal``: ``j <= i``. ``window`` (0: none): ``i - j < window``. ``chunk`` (0: none): ``i // chunk == j // chunk``.
    """

    causal: bool = True
    window: int = 0
    chunk: int = 0
    unsupported: str = ""  # why the rule cannot be expressed, empty if it can


def encode_rule(rule: AttentionRule) -> str:
    """The rule as a string that `transformers` passes along in place of a mask."""
    return "|".join((_PREFIX, str(int(rule.causal)), str(rule.window), str(rule.chunk), rule.unsupported))


def decode_rule(mask: object) -> AttentionRule | None:
    """The rule in a mask argument, or None when the model passed no mask at all.

    Raises:
        ValueError: the mask is neither None nor one of our rule strings (the model made its own).
    """
    if mask is None:
        return None
    if isinstance(mask, str) and mask.startswith(_PREFIX):
        _, causal, window, chunk, unsupported = mask.split("|", 4)
        return AttentionRule(causal == "1", int(window), int(chunk), unsupported)
    raise ValueError(f"the attention mask is a {type(mask).__name__} that the model computed itself")


def reconcile(rule: AttentionRule | None, window: int | None, is_causal: bool, extras: list[str]) -> AttentionRule:
    """Hold the recorded rule against what the attention call says of itself.

    Args:
        rule: what the mask function recorded; None when the model made no mask.
        window: the ``sliding_window`` argument of the attention call.
        is_causal: ``module.is_causal`` or the call's own argument.
        extras: names of further arguments with a meaning that `gs.attention` does not have.
    """
    if extras:
        return AttentionRule(unsupported=f"the attention call has arguments of unknown meaning: {', '.join(extras)}")
    if rule is None:
        if not is_causal:
            return AttentionRule(unsupported="attention is bidirectional (no mask, module.is_causal is False)")
        return AttentionRule(window=window or 0)
    if rule.unsupported:
        return rule
    if window and rule.window and window != rule.window:
        return AttentionRule(unsupported=f"the mask has sliding window {rule.window}, the attention call {window}")
    # The mask decides, as it does in the eager implementation that is our oracle: a window argument beside a full
    # causal mask has no effect there.
    return rule


def _recorder(kind: str, config: Any) -> Callable[..., str]:
    def record(*args: Any, **kwargs: Any) -> str:
        overlays = [name for name in _OVERLAYS if kwargs.get(name) is not None]
        effective = kwargs.get("config", args[0] if args else config)
        if overlays:
            return encode_rule(AttentionRule(unsupported=f"mask with {', '.join(overlays)}"))
        if not getattr(effective, "is_causal", True):
            return encode_rule(AttentionRule(unsupported="bidirectional mask (config.is_causal is False)"))
        if kind == "sliding":
            return encode_rule(AttentionRule(window=int(effective.sliding_window)))
        if kind == "chunked":
            return encode_rule(AttentionRule(chunk=int(effective.attention_chunk_size)))
        if kind == "bidirectional":
            return encode_rule(AttentionRule(unsupported="bidirectional mask"))
        return encode_rule(AttentionRule())

    return record


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Padding masks of recurrent layers: packed requests have no padding."""
    return None


@contextlib.contextmanager
def recorded_masks(model: nn.Module) -> Iterator[None]:
    """Within the context the mask functions that ``model``'s code calls return rule strings."""
    from transformers import masking_utils

    config = model.config
    recorders: dict[str, Callable[..., Any]] = {
        "create_causal_mask": _recorder("causal", config),
        "create_sliding_window_causal_mask": _recorder("sliding", config),
        "create_chunked_causal_mask": _recorder("chunked", config),
        "create_bidirectional_mask": _recorder("bidirectional", config),
        "create_bidirectional_sliding_window_mask": _recorder("bidirectional", config),
        "create_recurrent_attention_mask": _no_mask,
    }
    recorders = {name: f for name, f in recorders.items() if hasattr(masking_utils, name)}
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    modules = {masking_utils, *(sys.modules[name] for name in names if name in sys.modules)}
    undo: list[Callable[[], None]] = []
    for module in modules:
        for name, replacement in recorders.items():
            original = getattr(module, name, None)
            if original is not None:
                undo.append(functools.partial(setattr, module, name, original))
                setattr(module, name, replacement)
    by_layer_type = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    saved = dict(by_layer_type)
    undo.append(lambda: by_layer_type.update(saved))
    for layer_type, function in saved.items():
        # partial() in newer versions: the function below it has the name
        name = getattr(getattr(function, "func", function), "__name__", "")
        if name in recorders:
            by_layer_type[layer_type] = recorders[name]
    try:
        yield
    finally:
        for restore in undo:
            restore()
