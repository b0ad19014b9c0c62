"""Turns transformers' checkpoint conversion mapping into expressions of the weight program.

transformers keeps, per model type, how published tensors become the parameters of its modules: renamings (regular
expressions) and converters (stack the experts, join gate and up, split a fused QKV, ...). The mapping is read as data:
names go through transformers' own renaming, and each converter operation is restated here over expressions, so that
shapes can be checked before a byte is read and nothing of transformers is needed to execute the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from graphserve.models.weight_program import (
    Concat,
    Expression,
    Load,
    Reshape,
    Shape,
    ShapeError,
    Slice,
    Stack,
    Transpose,
    shape_of,
    tensors_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Collected = dict[str, list[Expression]]

# How a text model's tensors are named inside a multimodal checkpoint, and their names in the text model alone.
WRAPPER_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
    ("model.text_model.", "model."),
    ("text_model.", "model."),
    ("thinker.model.", "model."),
    ("thinker.lm_head.", "lm_head."),
)


class ConversionError(ValueError):
    """A conversion cannot be expressed or does not fit the checkpoint; the message names tensor and reason."""


class ConversionResult:
    """What a checkpoint's tensors become.

    ``values``: expressions by parameter name. ``unused``: tensors that no parameter takes. ``is_wrapped``: the tensors
    were found under a multimodal model's prefix. ``problems``: reasons by the parameter that could not be made.
    """

    def __init__(self) -> None:
        self.values: dict[str, Expression] = {}
        self.unused: list[str] = []
        self.is_wrapped = False
        self.problems: dict[str, str] = {}


def convert_names(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> ConversionResult:
    """Map every stored tensor to the parameters it feeds.

    Args:
        model: the model (any device; only names and shapes are read).
        shapes: stored shapes by tensor name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    result = ConversionResult()
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        for candidate in (name, *_unwrapped(name)):
            target, pattern = rename_source_key(candidate, renamings, converters, model.base_model_prefix, state)
            if target not in state and candidate in state:
                target, pattern = candidate, None
            if target in state:
                result.is_wrapped |= candidate != name
                break
        else:
            result.unused.append(name)
            continue
        if pattern is None and target in result.values:
            other = next(tensors_of(result.values[target]))
            result.problems[target] = f"tensors {other} and {name} both become it"
        elif pattern is None:
            result.values[target] = Load(name)
        else:
            groups.setdefault(target, (by_pattern[pattern], {}))[1].setdefault(pattern, []).append(name)
    for target, (converter, sources) in groups.items():
        try:
            made = _apply(converter, target, sources, model, state, shapes)
        except (ConversionError, ShapeError) as error:
            result.problems.update({name: str(error) for name in _targets(converter, target) if name in state})
            continue
        for name, value in made.items():
            if name in state:
                result.values[name] = value
            else:
                result.unused.extend(names[0] for names in sources.values())
    return result


def _unwrapped(name: str) -> list[str]:
    return [new + name.removeprefix(old) for old, new in WRAPPER_PREFIXES if name.startswith(old)]


def _targets(converter: Any, target: str) -> list[str]:
    """Full names of all parameters a converter makes, given the first one's."""
    first = converter.target_patterns[0]
    return [target.replace(first, pattern) for pattern in converter.target_patterns]


def _apply(
    converter: Any,
    target: str,
    sources: dict[str, list[str]],
    model: PreTrainedModel,
    state: Mapping[str, Any],
    shapes: Mapping[str, Shape],
) -> dict[str, Expression]:
    """Run a converter's operations over expressions; returns full parameter names."""
    _check_numbering(sources)
    _check_complete(converter, sources)
    collected: Collected = {pattern: [Load(name) for name in names] for pattern, names in sources.items()}
    context = _Context(converter, target, model, state, shapes)
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind not in OPERATIONS:
            raise ConversionError(
                f"transformers converts it with {kind}, which is not supported; supported: {', '.join(OPERATIONS)}"
            )
        collected = OPERATIONS[kind](operation, collected, context)
    # The patterns are parts of names: what stands around the first one in the target stands around the others too.
    full_name = target.replace("*.", "0.")
    for pattern in collected:
        if pattern in full_name:
            prefix, _, suffix = full_name.partition(pattern)
            return {prefix + key + suffix: _single(values) for key, values in collected.items()}
    return {key: _single(values) for key, values in collected.items()}


class _Context:
    def __init__(
        self, converter: Any, target: str, model: PreTrainedModel, state: Mapping[str, Any], shapes: Mapping[str, Shape]
    ) -> None:
        self.source_patterns: list[str] = converter.source_patterns
        self.target_patterns: list[str] = converter.target_patterns
        self.target = target
        self.model = model
        self.state = state
        self.shapes = shapes

    def shape(self, expression: Expression) -> Shape:
        return shape_of(expression, self.shapes)

    def only_target(self) -> str:
        if len(self.target_patterns) != 1:
            raise ConversionError(f"conversion to {self.target_patterns} has an undefined target")
        return self.target_patterns[0]

    def next_key(self, key: str) -> str:
        """The name a one-to-one operation gives its result: the target when it is the only one, else unchanged."""
        return self.target_patterns[0] if len(self.source_patterns) == len(self.target_patterns) == 1 else key


def _single(values: list[Expression]) -> Expression:
    if len(values) != 1:
        raise ConversionError(f"expected one tensor, found {len(values)}: {values[:2]}")
    return values[0]


def _check_numbering(sources: dict[str, list[str]]) -> None:
    """Tensors behind a ``*`` (one an expert) are numbered 0, 1, 2, ... without holes, equally in all patterns."""
    numbered = {pattern: _by_number(names) for pattern, names in sources.items() if "*" in pattern and len(names) > 1}
    count = 1 + max((number for names in numbered.values() for number in names), default=-1)
    missing = [
        "".join((*parts[:column], str(number), *parts[column + 1 :]))
        for names in numbered.values()
        for parts, column in [next(iter(names.values()))]
        for number in range(count)
        if number not in names
    ]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ConversionError(f"tensor {missing[0]}{more} missing: expected numbers 0 to {count - 1} for each")


def _by_number(names: list[str]) -> dict[int, tuple[list[str], int]]:
    """Names by the one number in which they differ, each split around its numbers, with that number's place."""
    split = [re.split(r"(\d+)", name) for name in names]
    if len({len(parts) for parts in split}) > 1:
        return {}
    places = [place for place in range(1, len(split[0]), 2) if len({parts[place] for parts in split}) > 1]
    return {int(parts[places[0]]): (parts, places[0]) for parts in split} if len(places) == 1 else {}


def _check_complete(converter: Any, sources: dict[str, list[str]]) -> None:
    """A join needs all its parts; without one it would only be seen as a wrong shape."""
    absent = [pattern for pattern in converter.source_patterns if pattern not in sources]
    if absent and any(type(operation).__name__ == "Concatenate" for operation in converter.operations):
        present = next(iter(sources.values()))[0]
        raise ConversionError(f"the tensors {absent[0]} that belong to {present} are missing")


def _chunk(op: Any, collected: Collected, context: _Context) -> Collected:
    value = _single(_single_entry(collected))
    if op.num_shards_attribute is None:
        targets = context.target_patterns
    else:
        count = getattr(context.model.config.get_text_config(), op.num_shards_attribute)
        targets = [context.only_target().replace("*", str(index)) for index in range(count)]
    shape = context.shape(value)
    dim = op.dim % len(shape)
    if shape[dim] % len(targets):
        raise ConversionError(f"{value} of shape {list(shape)} does not divide into {len(targets)} in dimension {dim}")
    length = shape[dim] // len(targets)
    return {key: [Slice(value, dim, index * length, length)] for index, key in enumerate(targets)}


def _split(op: Any, collected: Collected, context: _Context) -> Collected:
    value = _single(_single_entry(collected))
    dim = op.dim % len(context.shape(value))
    result: Collected = {}
    start = 0
    for key in context.target_patterns:
        length = context.state[context.target.replace(context.target_patterns[0], key)].shape[dim]
        result[key] = [Slice(value, dim, start, length)]
        start += length
    if start != context.shape(value)[dim]:
        raise ConversionError(f"{value} expected {start} in dimension {dim}, found {list(context.shape(value))}")
    return result


def _concatenate(op: Any, collected: Collected, context: _Context) -> Collected:
    parts = [value for pattern in context.source_patterns for value in collected.get(pattern, [])]
    dim = op.dim % len(context.shape(parts[0]))
    return {context.only_target(): [parts[0] if len(parts) == 1 else Concat(tuple(parts), dim)]}


def _merge_modulelist(op: Any, collected: Collected, context: _Context) -> Collected:
    if len(collected) == 1:
        (values,) = collected.values()
        return {context.only_target(): [Stack(tuple(values), op.dim)]}
    return {pattern: [Stack(tuple(values), op.dim)] for pattern, values in collected.items()}


def _transpose(op: Any, collected: Collected, context: _Context) -> Collected:
    (key,) = collected
    value = _single(collected[key])
    shape = context.shape(value)
    dim0, dim1 = op.dim0 % len(shape), op.dim1 % len(shape)
    if getattr(op, "check_dims", False) and shape == tuple(context.state[context.target].shape):
        return {context.next_key(key): [value]}
    return {context.next_key(key): [Transpose(value, dim0, dim1)]}


def _interleave(op: Any, collected: Collected, context: _Context) -> Collected:
    (key,) = collected
    value = _single(collected[key])
    shape = context.shape(value)
    dim = op.dim % len(shape)
    pair = (2, shape[dim] // 2) if getattr(op, "inverse", False) else (shape[dim] // 2, 2)
    split = Reshape(value, (*shape[:dim], *pair, *shape[dim + 1 :]))
    # transformers names the result after the first target, also when a Chunk follows.
    return {context.target_patterns[0]: [Reshape(Transpose(split, dim, dim + 1), shape)]}


def _permute_for_rope(op: Any, collected: Collected, context: _Context) -> Collected:
    config = context.model.config
    if op.subconfig_key is not None:
        config = getattr(config, op.subconfig_key, config)
    heads = getattr(config, "num_attention_heads", 1)
    result: Collected = {}
    for key, values in collected.items():
        names = getattr(op, "permute_layer_names", None)
        if names is None or any(name in key for name in names):
            value = _single(values)
            shape = context.shape(value)
            half = shape[0] // heads // 2
            pair = (2, half) if getattr(op, "inverse", False) else (half, 2)
            values = [Reshape(Transpose(Reshape(value, (heads, *pair, *shape[1:])), 1, 2), shape)]
        result[context.next_key(key)] = values
    return result


def _conv3d_to_linear(op: Any, collected: Collected, context: _Context) -> Collected:
    (key,) = collected
    value = _single(collected[key])
    shape = context.shape(value)
    return {context.next_key(key): [Reshape(value, (shape[0], math.prod(shape[1:])))]}


def _single_entry(collected: Collected) -> list[Expression]:
    if len(collected) != 1:
        raise ConversionError(f"expected one source, found {list(collected)}")
    return next(iter(collected.values()))


OPERATIONS: dict[str, Callable[[Any, Collected, _Context], Collected]] = {
    "Chunk": _chunk,
    "Split": _split,
    "Concatenate": _concatenate,
    "MergeModulelist": _merge_modulelist,
    "Transpose": _transpose,
    "Interleave": _interleave,
    "PermuteForRope": _permute_for_rope,
    "Conv3dToLinear": _conv3d_to_linear,
}
