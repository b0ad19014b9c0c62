"""What launches look like to a kernel generator: tensor specs symbolic in the step sizes, attributes by name."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from graphserve.kernels.arg_spec import ArgSpec
from graphserve.plan.arena import ALIGNMENT, launch_inputs
from graphserve.plan.runner import StepSize, resolve_op, run_view, torch_dtype
from graphserve.plan.schema import Launch, Plan
from graphserve.plan.symbols import evaluate
from graphserve.runtime.kv_cache import KVCache

# Two step sizes at which views are sampled; a dimension that differs between them is matched to T, R or S.
_SAMPLES = (StepSize((13, 7, 3)), StepSize((29, 11, 5)))


def op_name(launch: Launch) -> str:
    """A generator's name of a launch's op: a gs op's without ``gs.``, ``gather_rows`` for an index_select of rows,
    ``concat`` for a cat; empty for any other.
    """
    namespace, name, _ = launch.op.split(".")
    if namespace == "gs":
        return name
    if launch.op == "aten.index_select.default" and launch.args[1] == 1:
        return "gather_rows"
    return "concat" if launch.op == "aten.cat.default" else ""


def value_name(argument: Any) -> str:
    """The value that a launch argument names, empty if it is none."""
    return argument["v"] if isinstance(argument, dict) and "v" in argument else ""


def split_arguments(launch: Launch, specs: dict[str, ArgSpec]) -> tuple[list[ArgSpec | None], dict[str, Any]]:
    """Tensor arguments in schema order and the others by name."""
    args: list[ArgSpec | None] = []
    attrs: dict[str, Any] = {}
    values = list(launch.args)
    for position, argument in enumerate(resolve_op(launch.op)._schema.arguments):  # type: ignore[attr-defined]
        given = values[position] if position < len(values) else launch.kwargs.get(argument.name, argument.default_value)
        if "List[Tensor]" in str(argument.type):
            args += [specs.get(value_name(item)) for item in given]
        elif "Tensor" in str(argument.type):
            args.append(specs.get(value_name(given)))
        else:
            attrs[argument.name] = float(given["f"]) if isinstance(given, dict) else given
    return args, attrs


def unknown_arguments(launch: Launch, specs: dict[str, ArgSpec]) -> list[str]:
    """Values a launch reads that have no spec: a generator would take them for absent ones."""
    return [name for name in launch_inputs(launch) if name not in specs]


def tensor_names(launch: Launch) -> list[str]:
    """Names of a launch's tensor arguments in op order, then of its outputs; empty for absent ones."""
    if op_name(launch) == "gather_rows":
        names = [value_name(launch.args[0]), value_name(launch.args[2])]
    else:
        names = []
        for i, argument in _tensor_arguments(launch.op):
            given = launch.args[i] if i < len(launch.args) else launch.kwargs.get(argument)
            names += [value_name(item) for item in (given if isinstance(given, (list, tuple)) else [given])]
    return names + [name for name in launch.outputs if name is not None]


@functools.cache
def _tensor_arguments(op: str) -> list[tuple[int, str]]:
    """Place and name of each argument of an op that is a tensor, or several. Every bound launch asks for them."""
    arguments = resolve_op(op)._schema.arguments  # type: ignore[attr-defined]
    return [(i, argument.name) for i, argument in enumerate(arguments) if "Tensor" in str(argument.type)]


def value_specs(plan: Plan, kv_cache: KVCache) -> dict[str, ArgSpec]:
    """Shape and strides of every value, symbolic in T, R and S, by evaluating all views at two step sizes."""
    first, second = ({**_sample(plan, kv_cache, size)} for size in _SAMPLES)
    specs: dict[str, ArgSpec] = {}
    for name, a in first.items():
        b = second[name]
        shape = tuple(map(_symbolic, a.shape, b.shape))
        strides = tuple(map(_symbolic, a.stride(), b.stride()))
        if None in shape or None in strides:
            continue
        is_contiguous = a.is_contiguous() and b.is_contiguous()
        dtype = str(a.dtype).removeprefix("torch.")
        alignment = math.gcd(*(t.storage_offset() * t.element_size() for t in (a, b)), ALIGNMENT)
        specs[name] = ArgSpec(dtype, shape, None if is_contiguous else strides, alignment)  # type: ignore[arg-type]
    for group in range(len(plan.cache_groups)):
        row = f"B_{group}"
        specs[f"block_table.{group}"] = ArgSpec("int32", ("S", row), (row, 1))
    for layer, (keys, values) in enumerate(kv_cache.layers):
        for name, tensor in ((f"kv_k.{layer}", keys), (f"kv_v.{layer}", values)):
            # The number of blocks is no constant of a kernel: pools of any size share it.
            dtype = str(tensor.dtype).removeprefix("torch.")
            specs[name] = ArgSpec(dtype, ("num_blocks", *tensor.shape[1:]), tuple(tensor.stride()))
    return specs


def _sample(plan: Plan, kv_cache: KVCache, size: StepSize) -> dict[str, torch.Tensor]:
    tokens, rows, seqs = size

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tensors: dict[str, Any] = {
        name: empty(tuple(int(d) for d in w.spec.shape), torch_dtype(w.spec.dtype)) for name, w in plan.weights.items()
    }
    tensors |= {"input_ids": empty((1, tokens), torch.int64), "positions": empty((1, tokens), torch.int64)}
    tensors["logits_indices"] = empty((rows,), torch.int64)
    tensors["query_start_loc"] = empty((seqs + 1,), torch.int32)
    tensors["seq_lens"] = empty((seqs,), torch.int32)
    for given, spec in plan.inputs.items():
        tensors[given] = empty(tuple(evaluate(d, tokens, rows) for d in spec.shape), torch_dtype(spec.dtype))
    for group in range(len(plan.cache_groups)):
        tensors[f"slot_mapping.{group}"] = empty((tokens,), torch.int64)
        tensors[f"block_table.{group}"] = empty((seqs, 1), torch.int32)
    for layer, (keys, values) in enumerate(kv_cache.layers):
        tensors[f"kv_k.{layer}"], tensors[f"kv_v.{layer}"] = keys.to("meta"), values.to("meta")
    for launch in plan.launches:
        if launch.kind == "view":
            run_view(launch, tensors, size, torch.device("meta"))
            continue
        for name in launch.outputs:
            if name is not None:
                spec = plan.buffers[name]
                shape = tuple(evaluate(d, tokens, rows) for d in spec.shape)
                tensors[name] = empty(shape, torch_dtype(spec.dtype))
    return tensors


def _symbolic(a: int, b: int) -> int | str | None:
    """The expression whose value is ``a`` at the first sample size and ``b`` at the second."""
    if a == b:
        return a
    for symbol, x, y in zip("TRS", *_SAMPLES, strict=True):
        if a % x == 0 and a // x * y == b:
            return symbol if a == x else f"{a // x}*{symbol}"
    for symbol, x, y in zip("TRS", *_SAMPLES, strict=True):
        if (a, b) == (x + 1, y + 1):  # where something begins, for each of them and at the end
            return f"{symbol}+1"
    return None
