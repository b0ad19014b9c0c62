"""Why a model cannot be traced, in sentences that name module and reason.

What can be told from the model itself is told before the trace, which takes seconds to minutes. What Dynamo reports is
cut down to the line of modelling code where it stopped and the reason.
"""

from __future__ import annotations

import functools
import inspect
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from graphserve.compiler.layers import LayerStack
from graphserve.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Stands before a reason of our own in an exception that passes through Dynamo.
MARKER = "graphserve-refusal: "

_MAX_REASON_CHARS = 240


def refuse_before_trace(model: PreTrainedModel, stack: LayerStack | None) -> None:
    """Raise for what the modules alone show.

    Raises:
        UnsupportedModelError: ``forward`` takes no positions, positions are counted by a rule of the model's own, or a
            layer has no attention that `transformers` lets us replace.
    """
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise UnsupportedModelError(f"{name}.forward takes no position_ids: packed requests cannot be told apart")
    for path, module in model.named_modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            raise UnsupportedModelError(
                f"{path} ({type(module).__name__}) counts positions from padding_idx + 1 over the tokens that are not "
                "padding; graphserve numbers the tokens of a request from 0, which would give other logits"
            )
    if stack is None:
        return
    for number in range(stack.depth):
        layer = model.get_submodule(f"{stack.path}.{number}")
        if not any(_calls_attention_interface(type(module)) for module in layer.modules()):  # type: ignore[arg-type]  # mypy takes a class for unhashable
            parts = ", ".join(dict.fromkeys(type(child).__name__ for child in layer.children()))
            raise UnsupportedModelError(
                f"{stack.path}.{number} ({type(layer).__name__} of {parts}) calls no attention of transformers' "
                "AttentionInterface: layers with a recurrent state, and attention code of a model's own, are not served"
            )


@functools.cache
def _calls_attention_interface(cls: type[nn.Module]) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls)
    except (OSError, TypeError):  # no source at hand: the trace will tell
        return True


def trace_failure_reason(error: BaseException) -> str:
    """One line a person can act on, out of Dynamo's report."""
    text = str(error)
    if MARKER in text:
        return re.sub(r"""['"]\)+$""", "", text.split(MARKER, 1)[1].splitlines()[0])  # the end of RuntimeError('...')
    return f"{_what(text, error)}{_where(error)}"


def _what(text: str, error: BaseException) -> str:
    raised = re.search(r"raised exception (\w+)\((.*)\)", text)
    if raised is not None:
        message = raised[2].strip("'\"")
        # The attention rule travels as a string in the mask's place: what fails on a string was done to the mask.
        if "str" in message or (raised[1] == "AttributeError" and hasattr(torch.Tensor, message)):
            return f"it computes with the attention mask itself ({message})"
        return f"{raised[1]}: {message}"[:_MAX_REASON_CHARS]
    explanation = re.search(r"Explanation: (.*)", text)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return (explanation[1] if explanation is not None else first)[:_MAX_REASON_CHARS].rstrip(". ")


def _where(error: BaseException) -> str:
    """The innermost line of modelling code, such as `` (modeling_bloom.py:120 in forward: alibi = ...)``."""
    frames = [*traceback.extract_tb(error.__traceback__), *(getattr(error, "real_stack", None) or ())]
    for frame in reversed(frames):
        file = Path(frame.filename)
        if file.name.startswith("modeling_") and "models" in file.parts:
            return f" ({file.name}:{frame.lineno} in {frame.name}: {(frame.line or '').strip()})"
    return ""
