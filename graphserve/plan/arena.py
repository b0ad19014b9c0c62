"""Where each buffer of a plan lives: one arena, offsets by liveness, equal for every step size.

Offsets are computed once for the largest step. A buffer therefore never moves, which is what lets generated kernels be
bound to pointers once, whatever the token count of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from graphserve.plan.schema import Launch, Plan
from graphserve.plan.symbols import evaluate

ALIGNMENT = 64  # bytes: one cache line, and more than any vector load needs
ITEM_SIZE = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "complex128": 16,
    "complex64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
    "bool": 1,
}


class ArenaLayout(msgspec.Struct, frozen=True):
    """Byte offset of each buffer and the arena's size."""

    offsets: dict[str, int]
    num_bytes: int


def value_names(json_value: Any) -> Iterator[str]:
    """Names of all values mentioned in a launch argument."""
    if isinstance(json_value, dict):
        if "v" in json_value:
            yield json_value["v"]
    elif isinstance(json_value, (list, tuple)):
        for item in json_value:
            yield from value_names(item)


def launch_inputs(launch: Launch) -> Iterator[str]:
    """Names of all values a launch reads."""
    yield from value_names(launch.args)
    yield from value_names(list(launch.kwargs.values()))


def layout(plan: Plan, max_tokens: int, max_rows: int) -> ArenaLayout:
    """Place the buffers of ``plan`` for steps of up to ``max_tokens`` tokens and ``max_rows`` logits rows.

    Two buffers share bytes only if no launch can read one after the other was written. A view keeps its base alive.
    """
    base: dict[str, str] = {}
    born: dict[str, int] = {}
    dies: dict[str, int] = {}
    for index, launch in enumerate(plan.launches):
        inputs = list(launch_inputs(launch))
        for name in inputs:
            if base.get(name, name) in born:
                dies[base.get(name, name)] = index
        if launch.kind == "view":
            source = inputs[0]
            for output in launch.outputs:
                if output is not None:
                    base[output] = base.get(source, source)
        else:
            for output in launch.outputs:
                if output is not None:
                    born[output] = dies[output] = index
    for output in plan.outputs:
        dies[base.get(output, output)] = len(plan.launches)

    sizes = {name: _num_bytes(plan, name, max_tokens, max_rows) for name in born}
    offsets: dict[str, int] = {}
    # Largest first, each at the lowest offset free over its whole life: near the lower bound in practice.
    for name in sorted(born, key=lambda n: (-sizes[n], born[n])):
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if born[other] <= dies[name] and born[name] <= dies[other]
        )
        start = 0
        for low, high in taken:
            if start + sizes[name] <= low:
                break
            start = max(start, high)
        offsets[name] = start
    total = max((offsets[n] + sizes[n] for n in offsets), default=0)
    return ArenaLayout(offsets, total)


def _num_bytes(plan: Plan, name: str, max_tokens: int, max_rows: int) -> int:
    spec = plan.buffers[name]
    count = ITEM_SIZE[spec.dtype]
    for dim in spec.shape:
        count *= evaluate(dim, max_tokens, max_rows)
    return -(-count // ALIGNMENT) * ALIGNMENT
