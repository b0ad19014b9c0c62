"""Loading: a checkpoint is checked as a whole against the model, then streamed parameter by parameter."""

from __future__ import annotations

import logging
import re
from collections import Counter, deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from graphserve.errors import CheckpointError
from graphserve.models.checkpoint import FLOAT_DTYPES, INTEGER_DTYPES, TORCH_DTYPES, Checkpoint
from graphserve.models.conversion import ConversionResult, convert_names
from graphserve.models.progress import Progress, no_progress
from graphserve.models.weight_program import (
    Expression,
    Load,
    ParameterRule,
    Shape,
    ShapeError,
    WeightProgram,
    evaluate,
    shape_of,
    tensors_of,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MAX_PROBLEMS_SHOWN = 10
NUM_READERS = 2
READ_AHEAD_BYTES = 256 << 20  # of memory beyond the weights themselves while they are loaded

# Buffers that older checkpoints stored and that are computed from the config nowadays.
RECOMPUTED_TENSORS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(bias|masked_bias)$")


def check_checkpoint(model: PreTrainedModel, model_dir: str | Path) -> WeightProgram:
    """Match a checkpoint's headers with a model's parameters; no tensor data is read.

    Args:
        model: the model on the meta device; parameter names, shapes and dtypes are what is expected.
        model_dir: the folder with the safetensors files.

    Returns:
        The program that makes every parameter, ties as the config says them: see :func:`different_ties`.

    Raises:
        CheckpointError: all problems found, the first ten in full: file, tensor, expected and found.
        ConfigError: the folder has no safetensors checkpoint.
    """
    checkpoint = Checkpoint.open(model_dir)
    _raise_problems(checkpoint.problems, checkpoint)
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    conversion = convert_names(model, shapes)
    problems: list[str] = []
    for names, parameter in _parameters(model):
        failed = [f"parameter {name}: {conversion.problems[name]}" for name in names if name in conversion.problems]
        stored = [name for name in names if name in conversion.values]
        if failed:
            problems.extend(failed)
            continue
        if not stored:
            problems.append(_missing_message(names, parameter, checkpoint))
            continue
        for name in stored:
            value = conversion.values[name]
            problems.extend(_mismatch(name, value, parameter, checkpoint, shapes))
            problems.extend(_wrong_dtypes(_rule(value, parameter), checkpoint))
    _raise_problems(problems, checkpoint)
    _report_unused(model, conversion, checkpoint)
    return _program(model, conversion.values)


def different_ties(program: WeightProgram, model_dir: str | Path) -> list[str]:
    """Names that the config ties to a parameter, but that the checkpoint stores with other values than its own.

    Like transformers, we load them separately: by ``program.untied(names)``, into a model that :func:`untie` has
    changed before it is traced. Cost: reads both of every pair that is stored twice.

    Raises:
        CheckpointError: a file changed after the check.
    """
    if not program.stored_twice:
        return []
    checkpoint = Checkpoint.open(model_dir)
    _raise_problems(checkpoint.problems, checkpoint)
    pairs = {name: (program.rules[program.aliases[name]], rule) for name, rule in program.stored_twice.items()}
    _raise_problems(
        [problem for pair in pairs.values() for rule in pair for problem in _wrong_dtypes(rule, checkpoint)], checkpoint
    )
    return sorted(name for name, (first, other) in pairs.items() if not _has_equal_values(first, other, checkpoint))


def warn_untied(names: Collection[str], model_dir: str | Path) -> None:
    """Say which of :func:`different_ties` are loaded separately."""
    for name in names:
        logger.warning(
            "%s: config ties %s to another parameter but the checkpoint holds different values: they are loaded "
            "separately", model_dir, name,
        )  # fmt: skip


def untie(model: PreTrainedModel, names: Collection[str]) -> None:
    """Make further names of tied parameters parameters of their own, in place."""
    import torch

    for name in names:
        owner, _, leaf = name.rpartition(".")
        parameter = model.get_parameter(name)
        fresh = torch.nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), leaf, fresh)


def foreseen_programs(model: PreTrainedModel) -> list[tuple[WeightProgram, dict[str, Shape]]]:
    """The programs for the checkpoints that can be expected of ``model``.

    The first is for the one that transformers itself would save, tied parameters once. Published checkpoints have that
    layout (experts apart, a fused QKV, ...) as far as transformers reads them by its conversion mapping. Some store
    tied parameters under every name, which is the second. Nothing but names and shapes is read.

    Args:
        model: the model on the meta device.

    Returns:
        The programs, each with its layout as shapes by tensor name; none if our own conversion cannot make every
        parameter from the first.
    """
    parameters = _parameters(model)
    once = _foreseen(model, {names[0]: parameter.detach() for names, parameter in parameters})
    if once is None:
        return []
    has_ties = any(len(names) > 1 for names, _ in parameters)
    every = {name: parameter.detach() for names, parameter in parameters for name in names}
    twice = _foreseen(model, every) if has_ties else None
    return [once] if twice is None else [once, twice]


def _foreseen(model: PreTrainedModel, saved: dict[str, torch.Tensor]) -> tuple[WeightProgram, dict[str, Shape]] | None:
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, saved)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    conversion = convert_names(model, shapes)
    for name, tensor in saved.items():
        value = conversion.values.get(name)
        if value is None or shape_of(value, shapes) != tuple(tensor.shape):
            return None
    return None if conversion.problems else (_program(model, conversion.values), shapes)


def _program(model: PreTrainedModel, values: dict[str, Expression]) -> WeightProgram:
    """The program of a model each of whose parameters has a value under one of its names at least."""
    rules: dict[str, ParameterRule] = {}
    aliases: dict[str, str] = {}
    stored_twice: dict[str, ParameterRule] = {}
    for names, parameter in _parameters(model):
        first, *others = [name for name in names if name in values]
        rules[names[0]] = _rule(values[first], parameter)
        aliases.update(dict.fromkeys(names[1:], names[0]))
        for name in others:
            if values[name] != values[first]:
                stored_twice[name] = _rule(values[name], parameter)
    return WeightProgram(rules=rules, aliases=aliases, stored_twice=stored_twice)


def _rule(value: Expression, parameter: torch.Tensor) -> ParameterRule:
    return ParameterRule(value, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))


def load_parameters(
    model: PreTrainedModel, model_dir: str | Path, progress: Progress = no_progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Check a checkpoint, then yield every parameter and persistent buffer of the model.

    The dtypes are the model's own (build_meta_model chose them: the serving dtype, float32 where the model insists).
    The check runs at the call, not at the first item.

    Yields:
        ``(name, tensor)``: CPU tensors that own their memory, in file order. The further names of a tied parameter
        follow it with the same tensor.

    Raises:
        CheckpointError: as check_checkpoint; or a file changed after the check.
    """
    program = check_checkpoint(model, model_dir)
    untied = different_ties(program, model_dir)
    untie(model, untied)
    warn_untied(untied, model_dir)
    return run_program(program.untied(untied), model_dir, progress)


def run_program(
    program: WeightProgram, model_dir: str | Path, progress: Progress = no_progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Execute a weight program; needs neither the model nor transformers. Yields and raises as load_parameters."""
    checkpoint = Checkpoint.open(model_dir)
    _raise_problems(checkpoint.problems, checkpoint)
    needed = {tensor for rule in program.rules.values() for tensor in tensors_of(rule.value)}
    missing = sorted(needed - checkpoint.tensors.keys())
    _raise_problems([f"tensor {name} is missing: it was there when the plan was made" for name in missing], checkpoint)
    # A stored program was made for these names and shapes, but maybe for a checkpoint with other dtypes.
    _raise_problems([text for rule in program.rules.values() for text in _wrong_dtypes(rule, checkpoint)], checkpoint)
    shapes = {name: checkpoint.tensors[name].shape for name in needed}
    return _stream(program, checkpoint, shapes, progress)


def _stream(
    program: WeightProgram, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    also: dict[str, list[str]] = {}
    for alias, name in program.aliases.items():
        also.setdefault(name, []).append(alias)
    done, total = 0, program.num_bytes
    progress("load weights", 0, total)
    for name, tensor in _read_ahead(program, checkpoint, shapes):
        yield name, tensor
        for alias in also.get(name, ()):
            yield alias, tensor
        done += tensor.nbytes
        progress("load weights", done, total)


def _read_ahead(
    program: WeightProgram, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter in order, read by threads while the consumer places the ones before it."""
    waiting: deque[tuple[str, int, Future[torch.Tensor]]] = deque()
    num_bytes = 0
    order = {name: position for position, name in enumerate(checkpoint.tensors)}
    in_file_order = sorted(program.rules.items(), key=lambda item: order[next(tensors_of(item[1].value))])
    with ThreadPoolExecutor(NUM_READERS, "weight reader") as pool:
        try:
            for name, rule in in_file_order:
                found = shape_of(rule.value, shapes)
                if found != rule.shape:
                    raise CheckpointError(
                        f"parameter {name}: expected shape {list(rule.shape)}, found {list(found)}: the checkpoint is "
                        "not the one that the plan was made for"
                    )
                while waiting and num_bytes + rule.num_bytes > READ_AHEAD_BYTES:
                    ready, size, future = waiting.popleft()
                    num_bytes -= size
                    yield ready, future.result()
                waiting.append((name, rule.num_bytes, pool.submit(evaluate, rule, checkpoint, shapes)))
                num_bytes += rule.num_bytes
            while waiting:
                ready, _, future = waiting.popleft()
                yield ready, future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # the consumer may have stopped early


def dummy_parameters(model: PreTrainedModel, seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Random values for every parameter and persistent buffer (``load_format="dummy"``): no checkpoint is read.

    Values are uniform in [-1e-3, 1e-3], small enough that no activation overflows float16; the same seed gives the
    same values, whatever order they are consumed in. Yields names as load_parameters does.
    """
    import torch

    for position, (names, parameter) in enumerate(_parameters(model)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        if parameter.dtype.is_floating_point:
            # Drawn in float32 so that a value does not depend on the dtype beyond its rounding.
            tensor = torch.empty(parameter.shape).uniform_(-1e-3, 1e-3, generator=generator).to(parameter.dtype)
        else:
            tensor = torch.zeros(parameter.shape, dtype=parameter.dtype)
        for name in names:
            yield name, tensor


def stored_dtype(model_dir: str | Path) -> torch.dtype | None:
    """The float dtype that most bytes of a checkpoint are stored in, or None when it has no float tensor."""
    import torch

    sizes: Counter[str] = Counter()
    for entry in Checkpoint.open(model_dir).tensors.values():
        if entry.dtype in FLOAT_DTYPES:
            sizes[entry.dtype] += entry.nbytes
    return getattr(torch, TORCH_DTYPES[sizes.most_common(1)[0][0]]) if sizes else None


def _parameters(model: PreTrainedModel) -> list[tuple[list[str], torch.Tensor]]:
    """Every parameter and persistent buffer once, with all its names (several when tied), model order."""
    by_identity: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(by_identity.values())


def _has_equal_values(rule: ParameterRule, other: ParameterRule, checkpoint: Checkpoint) -> bool:
    """Whether two parameters are the same once they are loaded."""
    import torch

    if not (isinstance(rule.value, Load) and isinstance(other.value, Load) and rule.shape):
        shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
        return torch.equal(evaluate(rule, checkpoint, shapes), evaluate(other, checkpoint, shapes))
    tensors, dtype = (rule.value.tensor, other.value.tensor), getattr(torch, rule.dtype)
    rows = max(1, (64 << 20) // max(1, rule.num_bytes // rule.shape[0]))  # 64 MiB a piece: they can be gigabytes
    for start in range(0, rule.shape[0], rows):
        count = min(rows, rule.shape[0] - start)
        first, second = (checkpoint.read(tensor, start, count).to(dtype) for tensor in tensors)
        if not torch.equal(first, second):
            return False
    return True


def _missing_message(names: list[str], parameter: torch.Tensor, checkpoint: Checkpoint) -> str:
    tied = f" (nor its tied name {', '.join(names[1:])})" if len(names) > 1 else ""
    kind = _kind(str(parameter.dtype))
    return f"tensor {names[0]} is missing{tied}: expected {kind} {list(parameter.shape)}, found none"


def _mismatch(
    name: str, value: Expression, parameter: torch.Tensor, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """What is wrong with the shapes of a parameter's stored tensors."""
    sources = list(tensors_of(value))
    entry = checkpoint.tensors[sources[0]]
    where = f"{entry.file}: tensor {sources[0]}"
    if len(sources) > 1:
        where += f" and {len(sources) - 1} more"
    if not isinstance(value, Load):
        where += f", which make {name}"
    try:
        found = shape_of(value, shapes)
    except ShapeError as error:
        return [f"{entry.file}: parameter {name}: {error}"]
    problems = []
    if found != tuple(parameter.shape):
        problems.append(f"{where}: expected shape {list(parameter.shape)}, found {list(found)}")
    return problems


def _wrong_dtypes(rule: ParameterRule, checkpoint: Checkpoint) -> list[str]:
    """The first stored tensor of a parameter whose kind of dtype is another than the parameter's."""
    kind = _kind(rule.dtype)
    expected = FLOAT_DTYPES if kind == "float" else INTEGER_DTYPES
    for tensor in tensors_of(rule.value):
        stored = checkpoint.tensors[tensor]
        if stored.dtype not in expected:
            return [f"{stored.file}: tensor {tensor}: expected {kind} values, found {stored.dtype}"]
    return []


def _kind(dtype: str) -> str:
    return "float" if "float" in dtype else "integer"


def _report_unused(model: PreTrainedModel, conversion: ConversionResult, checkpoint: Checkpoint) -> None:
    """Warn once about tensors that no parameter takes, except those that are known to be superfluous."""
    if conversion.is_wrapped:
        logger.info(
            "%s: %d tensors belong to other parts of a multimodal model and are not loaded",
            checkpoint.directory, len(conversion.unused),
        )  # fmt: skip
        return
    patterns = [*RECOMPUTED_TENSORS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    names = [name for name in conversion.unused if not any(re.search(pattern, name) for pattern in patterns)]
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        logger.warning(
            "%s: %d tensors are used by no parameter of %s: %s",
            checkpoint.directory, len(names), type(model).__name__, shown,
        )  # fmt: skip


def _raise_problems(problems: list[str], checkpoint: Checkpoint) -> None:
    if not problems:
        return
    lines = [f"  {problem}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
    if len(problems) > MAX_PROBLEMS_SHOWN:
        lines.append(f"  ... and {len(problems) - MAX_PROBLEMS_SHOWN} more")
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    raise CheckpointError(f"checkpoint {checkpoint.directory} cannot be loaded, {count}:\n" + "\n".join(lines))
