"""``explain --verify``: run the graph after every pass and name the first one that changes the logits.

Two packed requests go through the graph as each pass left it, with the checkpoint's weights in float32, and are held
against eager `transformers` (each request alone) and against the pass before. At the end the plan itself runs, with the
launches that this machine would use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from graphserve.compiler.build import BuildResult, build_plan
from graphserve.compiler.capture import register_interfaces
from graphserve.errors import CompileError
from graphserve.passes.base import Pass
from graphserve.passes.context import PassContext
from graphserve.plan.schema import CacheGroup, Plan
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.step_input import SamplingInput, StepInput

LENGTHS = (23, 7)  # tokens of the two requests: over one block, and under
BLOCK_SIZE = 16
# Largest relative change of the logits (max |a - b| / max |b|, float32) that one pass may make, by its tier. An exact
# pass may still change how many rows a product has, and with that the order of its sums.
TOLERANCE = {"exact": 1e-5, "approximate": 1e-4}


class Stage(msgspec.Struct, frozen=True):
    """Logits after one stage. ``change``: against the stage before; ``error``: against eager `transformers`."""

    name: str
    change: float
    error: float
    allowed: float

    @property
    def is_within(self) -> bool:
        return self.change <= self.allowed  # a nan is not


class Verification(msgspec.Struct, frozen=True):
    """All stages in order, and the first that departs (None if none does)."""

    stages: list[Stage]
    first_departure: str | None


def verify(hf_config: Any, parameters: dict[str, torch.Tensor], eager: torch.nn.Module, meta: Any) -> Verification:
    """Hold every pass of the pipeline against eager `transformers`.

    Args:
        hf_config: the model's config.
        parameters: float32 parameters and persistent buffers by name.
        eager: the same model in `transformers`, float32, on CPU.
        meta: the same model on the meta device in float32, RoPE baked for 64 tokens or more.

    Raises:
        UnsupportedModelError: the model is refused before any pass.
    """
    from graphserve.models.meta_model import non_persistent_buffers

    register_interfaces()
    generator = torch.Generator().manual_seed(0)
    vocab = hf_config.get_text_config().vocab_size
    requests = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in LENGTHS]
    with torch.inference_mode():
        truth = torch.cat([eager(torch.tensor([r]), use_cache=False).logits[0] for r in requests])
    buffers = non_persistent_buffers(meta)
    executor = _GraphExecutor(requests, parameters | buffers)
    stages: list[Stage] = []
    previous = truth

    def after_pass(item: Pass, ctx: PassContext) -> None:
        nonlocal previous
        logits = executor.run(ctx)
        stages.append(_stage(item.name, logits, previous, truth, TOLERANCE[item.tier]))
        previous = logits

    built = build_plan(meta, max(64, *LENGTHS), buffers, full_depth=True, after_pass=after_pass)
    logits = _run_plan(built, requests, parameters)
    stages.append(_stage("plan", logits, previous, truth, TOLERANCE["approximate"]))
    return Verification(stages, next((s.name for s in stages if not s.is_within), None))


def _stage(name: str, logits: torch.Tensor, previous: torch.Tensor, truth: torch.Tensor, allowed: float) -> Stage:
    return Stage(name, _relative(logits, previous), _relative(logits, truth), allowed)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


class _Batch:
    """Two whole prompts packed into one step, with blocks of their own."""

    def __init__(self, requests: Sequence[Sequence[int]]) -> None:
        lengths = [len(r) for r in requests]
        per_request = -(-max(lengths) // BLOCK_SIZE)
        self.table = np.arange(1, 1 + len(requests) * per_request, dtype=np.int32).reshape(len(requests), per_request)
        self.positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)
        owner = np.repeat(np.arange(len(requests)), lengths)
        blocks = self.table[owner, self.positions // BLOCK_SIZE].astype(np.int64)
        self.slots = blocks * BLOCK_SIZE + self.positions % BLOCK_SIZE
        self.input_ids = np.concatenate([np.asarray(r, dtype=np.int64) for r in requests])
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.num_blocks = 1 + self.table.size

    def step_input(self, num_groups: int) -> StepInput:
        total = len(self.input_ids)
        return StepInput(
            input_ids=self.input_ids,
            positions=self.positions,
            query_start_loc=self.starts,
            seq_lens=self.lengths,
            block_tables=[self.table] * num_groups,
            slot_mappings=[self.slots] * num_groups,
            logits_indices=np.arange(total, dtype=np.int64),
            token_lanes=np.zeros(total, dtype=np.int32),
            row_lanes=np.zeros(total, dtype=np.int32),
            sampling=SamplingInput(num_rows=0),
            num_tokens=total,
            num_sequences=len(self.lengths),
            num_logits_rows=total,
        )


class _GraphExecutor(fx.Interpreter):
    """Runs a graph at any stage of the pipeline on real tensors."""

    def __init__(self, requests: Sequence[Sequence[int]], weights: dict[str, torch.Tensor]) -> None:
        self._batch = _Batch(requests)
        self._weights = weights

    def run(self, ctx: PassContext) -> torch.Tensor:  # type: ignore[override]
        """Logits [T, vocab] of the graph as it is now."""
        values = self._values(ctx)
        with torch.inference_mode():
            for name, init in ctx.init_graphs.items():
                positions = torch.arange(ctx.max_model_len)[None]
                values[name] = self._interpret(init, values | {"positions": positions})
            return self._interpret(ctx.gm, values).reshape(len(self._batch.input_ids), -1)

    def _interpret(self, gm: fx.GraphModule, values: dict[str, torch.Tensor]) -> torch.Tensor:
        names = [n.meta.get("gs_input") or n.meta["gs_weight"] for n in gm.graph.nodes if n.op == "placeholder"]
        super().__init__(gm, garbage_collect_values=True)
        # Placeholders that a pass left behind have no users and need no value.
        result = super().run(*[values.get(name) for name in names], enable_io_processing=False)
        return result[0] if isinstance(result, (tuple, list)) else result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.gs.attention_trace.default:
            return self._attention(*args)
        if target in (torch.ops.gs.layer_begin.default, torch.ops.gs.layer_end.default):
            return args[0]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return super().call_function(target, args, kwargs)

    def _attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, layer: int, scale: float,
        window: int, chunk: int, softcap: float, causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        """Attention before it is lifted, each request by itself: [1, H, T, D] → [1, T, H, Dv]."""
        out = q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])
        groups = q.shape[1] // k.shape[1]
        for begin, end in zip(self._batch.starts[:-1], self._batch.starts[1:], strict=True):
            part = slice(int(begin), int(end))
            keys, values = (x[0, :, part].repeat_interleave(groups, 0) for x in (k, v))
            scores = q[0, :, part].float() @ keys.float().transpose(1, 2) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            i, j = (torch.arange(scores.shape[d]).view(s) for d, s in ((1, (-1, 1)), (2, (1, -1))))
            seen = torch.ones(scores.shape[1:], dtype=torch.bool)
            seen &= (j <= i) if causal else seen
            seen &= (i - j < window) if window else seen
            seen &= (i // chunk == j // chunk) if chunk else seen
            scores = scores.masked_fill(~seen, float("-inf"))
            if sinks is not None:
                scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)], -1)
            weights = F.softmax(scores, -1)[..., : keys.shape[1]]
            out[0, part] = (weights @ values.float()).transpose(0, 1).to(out.dtype)
        return out

    def _values(self, ctx: PassContext) -> dict[str, torch.Tensor]:
        batch = self._batch
        values = dict(self._weights)
        for name, (kind, sources, dim) in ctx.weight_recipes.items():
            parts = [values[s] for s in sources]
            values[name] = torch.cat(parts, dim) if kind == "concat" else parts[0].t()
        values |= {
            "input_ids": torch.from_numpy(batch.input_ids)[None],
            "positions": torch.from_numpy(batch.positions)[None],
            "logits_indices": torch.arange(len(batch.input_ids)),
            "query_start_loc": torch.from_numpy(batch.starts),
            "seq_lens": torch.from_numpy(batch.lengths),
        }
        groups = [CacheGroup(tuple(layers), *rule) for rule, layers in ctx.cache_groups.items()]
        for group in range(len(groups)):
            values[f"block_table.{group}"] = torch.from_numpy(batch.table)
            values[f"slot_mapping.{group}"] = torch.from_numpy(batch.slots)
        if groups:
            # A pool for each group: the same block ids serve all of them here.
            layout = Plan({}, [], [], {}, {}, list(ctx.cache_layers), [CacheGroup(_own_layers(groups))], (), [])
            cache = KVCache(layout, batch.num_blocks, BLOCK_SIZE, torch.device("cpu"))
            for layer, (keys, kv_values) in enumerate(cache.layers):
                values |= {f"kv_k.{layer}": keys, f"kv_v.{layer}": kv_values}
        return values


def _own_layers(groups: list[CacheGroup]) -> tuple[int, ...]:
    return tuple(sorted(layer for group in groups for layer in group.layers))


def _run_plan(
    built: BuildResult, requests: Sequence[Sequence[int]], parameters: dict[str, torch.Tensor]
) -> torch.Tensor:
    batch = _Batch(requests)
    num_groups = len(built.plan.cache_groups)
    step = batch.step_input(num_groups)
    # Groups share one pool, so each needs blocks of its own.
    size = batch.table.size
    step.block_tables = [batch.table + g * size for g in range(num_groups)]
    step.slot_mappings = [batch.slots + g * size * BLOCK_SIZE for g in range(num_groups)]
    runner = ModelRunner(built.plan, parameters, built.constants)
    runner.allocate_kv_cache(1 + size * max(1, num_groups), BLOCK_SIZE)
    with torch.inference_mode():
        logits = runner.forward(step).float().clone()
    runner.close()
    return logits


def verify_checkpoint(folder: Path) -> Verification:
    """:func:`verify` for a checkpoint on disk.

    Raises:
        CompileError: `transformers` and our loader disagree on what the checkpoint holds.
    """
    from transformers import AutoModelForCausalLM

    from graphserve.models.config import load_config
    from graphserve.models.meta_model import build_meta_model
    from graphserve.models.rope import bake_rope
    from graphserve.models.weight_loading import load_parameters

    register_interfaces()
    hf_config = load_config(folder)
    meta = build_meta_model(hf_config, torch.float32)
    bake_rope(meta, max(64, *LENGTHS))
    parameters = dict(load_parameters(meta, folder))
    eager = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for name, tensor in eager.named_parameters():
        if name in parameters and not torch.equal(tensor, parameters[name]):
            raise CompileError(f"parameter {name} was loaded with other values than transformers loads")
    return verify(hf_config, parameters, eager, meta)
