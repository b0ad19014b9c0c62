"""Decode steps of an 8B Llama shape with random weights: whole captured steps, as the engine runs them."""

from __future__ import annotations

import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.plan_build import llama_config
from graphserve.artifacts import open_store
from graphserve.compiler.build import build_plan
from graphserve.compiler.capture import register_interfaces
from graphserve.models.meta_model import build_meta_model, non_persistent_buffers
from graphserve.models.rope import bake_rope
from graphserve.plan.runner import StepSize
from graphserve.runtime.buckets import CaptureBuckets
from graphserve.runtime.cuda_graphs import CudaGraphs
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.step_input import CARRIED, SamplingInput, StepInput
from graphserve.runtime.step_lowering import TritonLowering
from graphserve.runtime.triton_backend import target_of
from graphserve.runtime.triton_plan import lower_to_triton

LAYERS, BLOCK_SIZE, MAX_MODEL_LEN = 32, 16, 4352
STEPS = [(batch, context) for batch in (1, 16, 64, 256) for context in (1024, 4096)]
KV_SHARE = 0.85  # of the memory that is free once the weights are loaded


def weights_on_device(shapes: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
    """Norm weights of 1, matrices of standard deviation 0.02, made where they are used."""
    for name, shape in shapes.items():
        weight = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
        yield name, weight if len(shape) == 1 else weight.normal_(0, 0.02)


def decode_step(batch: int, context: int, num_blocks: int) -> tuple[StepInput, float]:
    """One greedy step of ``batch`` sequences at the end of ``context`` tokens, and the share of their blocks that is
    distinct. Its tokens are those that the step before sampled.

    Where the pool is smaller than all contexts together, later sequences read earlier ones' blocks again.
    """
    per_seq = -(-context // BLOCK_SIZE)
    wanted = np.arange(batch * per_seq, dtype=np.int64).reshape(batch, per_seq)
    table = (wanted % (num_blocks - 1) + 1).astype(np.int32)
    # The new token of each sequence has a block of its own, so that no two write to one place.
    table[:, -1] = np.arange(1, batch + 1)
    lanes = np.arange(batch, dtype=np.int32)
    sampling = SamplingInput(num_rows=batch)
    sampling.stop_ids = np.full((batch, 1), -1, np.int32)
    sampling.tokens_left = np.full(batch, 1 << 20, np.int32)
    step = StepInput(
        input_ids=np.full(batch, CARRIED, np.int64),
        positions=np.full(batch, context - 1, np.int64),
        query_start_loc=np.arange(batch + 1, dtype=np.int32),
        seq_lens=np.full(batch, context, dtype=np.int32),
        block_tables=[table],
        slot_mappings=[table[:, -1].astype(np.int64) * BLOCK_SIZE + (context - 1) % BLOCK_SIZE],
        logits_indices=np.arange(batch, dtype=np.int64),
        token_lanes=lanes,
        row_lanes=lanes,
        sampling=sampling,
        num_tokens=batch,
        num_sequences=batch,
        num_logits_rows=batch,
    )
    return step, min(1.0, (num_blocks - 1) / (batch * per_seq))


def first_tokens(step: StepInput) -> StepInput:
    """The step with token ids of its own, so that its lanes have tokens to carry."""
    ids = np.random.default_rng(0).integers(10, 100_000, len(step.input_ids))
    return msgspec.structs.replace(step, input_ids=ids)


def measure_decode(seconds_left: Callable[[], float], reserve_s: float = 15) -> dict[str, Any]:
    """Milliseconds a step, by batch and context; also what building and loading took."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    register_interfaces()
    model = build_meta_model(llama_config(LAYERS), torch.bfloat16)
    bake_rope(model, MAX_MODEL_LEN)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    built = build_plan(model, MAX_MODEL_LEN, non_persistent_buffers(model))
    seconds["build plan"] = time.perf_counter() - start
    start = time.perf_counter()
    device = torch.device("cuda")
    model_runner = ModelRunner(built.plan, weights_on_device(shapes), built.constants, device=device)
    torch.cuda.synchronize()
    seconds["make weights"] = time.perf_counter() - start
    spec = built.plan.cache_layers[0]
    bytes_per_block = 2 * BLOCK_SIZE * spec.kv_heads * (spec.k_dim + spec.v_dim) * LAYERS
    free = torch.cuda.mem_get_info()[0]
    most = max(batch * context for batch, context in STEPS) // BLOCK_SIZE + 1
    num_blocks = min(most, int(free * KV_SHARE) // bytes_per_block)
    start = time.perf_counter()
    stream = torch.cuda.Stream(device)
    lowering = TritonLowering(device, stream, open_store())
    runner = DeviceRunner(
        built.plan, model_runner.weights, device, lowering=lowering, graphs=lambda scalars: CudaGraphs(), stream=stream
    )
    sizes = sorted({batch for batch, _ in STEPS})
    largest = StepSize((sizes[-1], sizes[-1], sizes[-1]))
    runner.allocate(num_blocks, BLOCK_SIZE, largest, sizes[-1], CaptureBuckets(sizes[-1], sizes))
    assert runner.kv_cache is not None
    with torch.inference_mode():
        for keys, values in runner.kv_cache.layers:
            keys.normal_()
            values.normal_()
    seconds["compile kernels and fill the cache"] = time.perf_counter() - start
    start = time.perf_counter()
    runner.record([StepSize((size, size, size)) for size in sizes], ["greedy"])
    torch.cuda.synchronize()
    seconds["capture"] = time.perf_counter() - start
    result: dict[str, Any] = {
        "model": f"Llama-3.1-8B shape, {LAYERS} layers, bf16, random weights",
        "what": "whole greedy steps from captured graphs: tokens in, layers, head, sampling, tokens out",
        "weight_bytes": model_runner.weight_bytes,
        "kv_blocks": num_blocks,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "steps": [],
    }
    for batch, context in STEPS:
        row: dict[str, Any] = {"batch": batch, "context": context}
        result["steps"].append(row)
        if seconds_left() < reserve_s:
            row["skipped"] = "no time left"
            continue
        try:
            bytes_read = model_runner.weight_bytes + batch * context * bytes_per_block // BLOCK_SIZE
            row |= _time_step(runner, stream, batch, context, num_blocks, bytes_read)
        except Exception:  # noqa: BLE001 - the suite's isolation boundary, once a step: its row says what it raised
            row["error"] = traceback.format_exc()[-3000:]
    lowered = lower_to_triton(built.plan, runner.kv_cache, target_of(torch.cuda.get_device_capability()))
    result["launch_kinds"] = dict(Counter(launch.kind for launch in lowered.plan.launches))
    result["refusals"] = sorted(set(lowered.refusals.values()))
    result["num_eager_steps"] = runner.num_eager_steps
    runner.close()
    model_runner.close()
    return result


def _time_step(
    runner: DeviceRunner, stream: torch.cuda.Stream, batch: int, context: int, num_blocks: int, num_bytes: int
) -> dict[str, Any]:
    """Steps as an engine drives them, the host one step behind: by events on the stream and by the host's clock."""
    step, distinct = decode_step(batch, context, num_blocks)
    runner.submit(first_tokens(step)).result()
    runner.submit(step).result()
    num_steps = 30
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    before = None
    torch.cuda.synchronize()
    start = time.perf_counter()
    events[0].record(stream)
    for event in events[1:]:
        handle = runner.submit(step)
        event.record(stream)
        if before is not None:
            before.result()
        before = handle
    assert before is not None
    tokens = before.result().token_ids
    host_ms = (time.perf_counter() - start) * 1e3 / num_steps
    on_device = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    if len(tokens) != batch or min(tokens) < 0:
        raise RuntimeError(f"tokens {tokens[:8]} of {batch} rows: the logits were not finite")
    ms = statistics.median(on_device)
    return {
        "event_ms": round(ms, 3),
        "event_ms_min_max": [round(min(on_device), 3), round(max(on_device), 3)],
        "host_ms": round(host_ms, 3),
        "tokens_per_s": round(batch / host_ms * 1e3, 1),
        "gb_s": round(num_bytes / ms / 1e6, 1),
        "distinct_kv_share": round(distinct, 3),
    }
