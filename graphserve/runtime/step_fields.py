"""What a step carries to the device, field by field, and where each lies when they are packed. No torch.

Fields lie behind one another for exactly the step's size, so a small step copies little, and their places depend on
the size alone. Those that only steps with sampling parameters read come last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from graphserve.plan.arena import ALIGNMENT, ITEM_SIZE, layout
from graphserve.plan.schema import Dim, Plan, TensorSpec
from graphserve.plan.symbols import evaluate
from graphserve.runtime.step_plan import LISTS, VARIANTS, StepLimits, step_inputs, step_plan

_COMMON = ("host_ids", "host_slots", "token_lanes", "row_lanes", "stop_ids", "tokens_left", "ring_slot")
_SAMPLING: tuple[str, ...] = ("temperature", "top_k", "top_p", "log_min_p", "keys")
_SAMPLING += ("repetition_penalty", "frequency_penalty", "presence_penalty", *(f"{name}_starts" for name in LISTS))

# Long and mostly empty: each has a buffer and a copy of its own.
LONG_FIELDS = ("bitmask", *(f"{name}_ids" for name in LISTS), *(name for name in LISTS.values() if name is not None))
NUM_SAMPLING_FIELDS = len(_SAMPLING)

Fields = dict[str, TensorSpec]
Place = tuple[int, tuple[int, ...]]  # offset in bytes, and shape


def packed_fields(model: Plan, limits: StepLimits, table_len: int) -> Fields:
    """Every packed field by the name of its value, in order; shapes are also affine in S, as ``S`` and ``S+1``.

    Args:
        table_len: places of a row of a block table.
    """
    given = step_inputs(model, limits)
    fields = {f"step.{name}": given[f"step.{name}"] for name in _COMMON}
    fields |= {
        "positions": TensorSpec((1, "T"), "int64"),
        "logits_indices": TensorSpec(("R",), "int64"),
        "query_start_loc": TensorSpec(("S+1",), "int32"),
        "seq_lens": TensorSpec(("S",), "int32"),
    }
    for group in range(len(model.cache_groups)):
        fields[f"block_table.{group}"] = TensorSpec(("S", table_len), "int32")
    return fields | {f"step.{name}": given[f"step.{name}"] for name in _SAMPLING}


def places(fields: Mapping[str, TensorSpec], size: tuple[int, int, int]) -> dict[str, Place]:
    """Where each field lies in a step of ``size`` (tokens, rows, sequences)."""
    found: dict[str, Place] = {}
    offset = 0
    for name, spec in fields.items():
        shape = tuple(_dimension(dim, size) for dim in spec.shape)
        found[name] = (offset, shape)
        offset += -(-math.prod(shape) * ITEM_SIZE[spec.dtype] // ALIGNMENT) * ALIGNMENT
    return found


def end_of(name: str, fields: Mapping[str, TensorSpec], where: Mapping[str, Place]) -> int:
    """The byte behind a field."""
    offset, shape = where[name]
    return offset + math.prod(shape) * ITEM_SIZE[fields[name].dtype]


def step_bytes(model: Plan, limits: StepLimits, table_len: int, largest: tuple[int, int, int]) -> int:
    """Memory on the device of the inputs and buffers of steps up to ``largest``, whatever their variant."""
    tokens, rows, _ = largest
    fields = packed_fields(model, limits, table_len)
    packed = end_of(next(reversed(fields)), fields, places(fields, largest))
    given = step_inputs(model, limits)
    own = [given[f"step.{name}"] for name in (*LONG_FIELDS, "last_tokens")]
    long = sum(math.prod(evaluate(d, tokens, rows) for d in s.shape) * ITEM_SIZE[s.dtype] for s in own)
    return packed + long + arena_bytes(model, limits, tokens, rows)


def arena_bytes(model: Plan, limits: StepLimits, tokens: int, rows: int) -> int:
    """Bytes of the arena that serves every variant."""
    return max(layout(step_plan(model, variant, limits).plan, tokens, rows).num_bytes for variant in VARIANTS)


def _dimension(dim: Dim, size: tuple[int, int, int]) -> int:
    tokens, rows, seqs = size
    if isinstance(dim, str) and dim.startswith("S"):
        return seqs + (dim == "S+1")
    return evaluate(dim, tokens, rows)
