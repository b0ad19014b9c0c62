"""A language model in three launches: the logits after a token are a row of a table, kept as key and value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from graphserve.plan.runner import StepSize
from graphserve.plan.schema import CacheGroup, CacheSpec, Launch, Plan, TensorSpec, WeightSpec
from graphserve.runtime.buckets import CaptureBuckets
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.recorder import Recorder
from graphserve.runtime.step_input import SamplingInput, StepInput

CPU = torch.device("cpu")
LANES = 8
BLOCK_SIZE = 4
MAX_TOKENS = 16
FIRST_SLOT = BLOCK_SIZE  # behind the null block


def table_plan(vocab: int) -> Plan:
    launches = [
        Launch("gs.embedding.default", ({"v": "input_ids"}, {"v": "table"}), {}, ("rows",)),
        Launch("aten.view.default", ({"v": "rows"}, [{"s": "T"}, 1, vocab]), {}, ("heads",), "view"),
        Launch(
            "gs.kv_write.default",
            tuple({"v": name} for name in ("heads", "heads", "kv_k.0", "kv_v.0", "slot_mapping.0")), {}, (),
        ),
        Launch("aten.index_select.default", ({"v": "rows"}, 1, {"v": "logits_indices"}), {}, ("logits",)),
    ]  # fmt: skip
    return Plan(
        model={"vocab_size": vocab, "max_model_len": 64},
        launches=launches,
        init=[],
        buffers={"rows": TensorSpec((1, "T", vocab), "float32"), "logits": TensorSpec((1, "R", vocab), "float32")},
        weights={"table": WeightSpec(TensorSpec((vocab, vocab), "float32"), "constant")},
        cache_layers=[CacheSpec(kv_heads=1, k_dim=vocab, v_dim=vocab, dtype="float32")],
        cache_groups=[CacheGroup((0,))],
        outputs=("logits",),
        passes=[],
    )


def table_runner(
    table: torch.Tensor, plan: Plan | None = None, buckets: CaptureBuckets | None = None, **options: Any
) -> DeviceRunner:
    """A runner of the model whose logits after token ``i`` are ``table[i]``; every step is recorded at once.

    Args:
        plan: another model, whose weight is the table.
        buckets: which sizes are recorded, all by default.
        options: of :class:`DeviceRunner`.
    """
    options = {"graphs": Recorder, "record_after": 0, **options}
    runner = DeviceRunner(plan or table_plan(len(table)), {"table": table}, CPU, **options)
    largest = StepSize((MAX_TOKENS,) * 3)
    runner.allocate(num_blocks=8, block_size=BLOCK_SIZE, largest=largest, num_lanes=LANES, buckets=buckets)
    return runner


def decode_step(
    input_ids: Sequence[int], sampling: SamplingInput, lanes: Sequence[int] | None = None, num_rows: int | None = None
) -> StepInput:
    """A decode step of one token a sequence; token ``i`` belongs to ``lanes[i]``, by default lane ``i``,
    and goes to slot ``FIRST_SLOT + i``.

    Args:
        num_rows: tokens, rows and sequences, padding included.
    """
    count = len(input_ids)
    size = num_rows or count
    ids = np.zeros(size, np.int64)
    ids[:count] = input_ids
    row_lanes = np.full(size, LANES, np.int32)
    row_lanes[:count] = range(count) if lanes is None else lanes
    return StepInput(
        input_ids=ids,
        positions=np.zeros(size, np.int64),
        query_start_loc=np.minimum(np.arange(size + 1), count).astype(np.int32),
        seq_lens=np.concatenate([np.ones(count), np.zeros(size - count)]).astype(np.int32),
        block_tables=[np.zeros((size, 1), np.int32)],
        slot_mappings=[np.where(np.arange(size) < count, FIRST_SLOT + np.arange(size), 0)],
        logits_indices=np.concatenate([np.arange(count), np.zeros(size - count)]).astype(np.int64),
        token_lanes=np.where(ids < 0, row_lanes, LANES).astype(np.int32),
        row_lanes=row_lanes,
        sampling=sampling,
        num_tokens=count,
        num_sequences=count,
        num_logits_rows=count,
    )
