"""Steps of the 8B Llama shape taken apart: captures, gaps between replays, sampling, nodes of graphs, prefill."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu_model import (
    GpuModel,
    decode_step,
    first_tokens,
    prefill_step,
    random_sampling,
    run_steps,
    step_size,
    step_times_ms,
)
from benchmarks.gpu_rates import product_tflop_s
from benchmarks.graph_nodes import GraphReader, captured, step_nodes
from graphserve.plan.runner import StepSize
from graphserve.runtime.buckets import CaptureBuckets
from graphserve.runtime.launch_specs import op_name, value_name
from graphserve.runtime.step_input import SamplingInput, StepInput
from graphserve.runtime.step_plan import Variant

MAX_SEQS = 256
PREFILLS = ((1, 4096), (2, 4096))  # prompts and tokens of each
CONTEXT = 1024
_AHEAD_CYCLES = 40_000_000  # some 20 ms: the host enqueues a step's launches meanwhile


def measure_captures(model: GpuModel) -> dict[str, Any]:
    """Seconds to capture the default decode buckets, as an engine does before its first request, and what they take.

    To be measured before anything else runs on the model; the first capture also makes the libraries' handles.
    """
    sizes = [StepSize((n, n, n)) for n in CaptureBuckets(MAX_SEQS).decode_sizes]
    rows: dict[str, Any] = {"buckets": len(sizes)}
    variants: tuple[Variant, ...] = ("greedy", "sample")
    for variant in variants:
        bytes_before, begin = model.graphs.num_bytes, time.perf_counter()
        model.runner.record(sizes, [variant])
        torch.cuda.synchronize()
        rows[variant] = {
            "seconds": round(time.perf_counter() - begin, 3),
            "bytes": model.graphs.num_bytes - bytes_before,
        }
    rows["graphs"] = len(model.graphs)
    return rows


def measure_gaps(model: GpuModel, batches: Sequence[int] = (1, 64, 256), count: int = 40) -> list[dict[str, Any]]:
    """Microseconds from the end of a replay to the begin of the next one, the host one step behind.

    The next step's inputs are copied to the device in between; the two events are counted too.
    """
    rows = []
    for batch in batches:
        step = decode_step(batch, CONTEXT, model.num_blocks)
        model.runner.submit(first_tokens(step)).result()
        model.runner.submit(step).result()
        model.graphs.replays = replays = []
        run_steps(model, step, count)
        model.graphs.replays = None
        # The first steps find the host no step ahead yet.
        gaps = [a.elapsed_time(b) * 1e3 for (_, a), (b, _) in zip(replays[2:], replays[3:], strict=False)]
        rows.append(
            {
                "batch": batch,
                "context": CONTEXT,
                "gap_us": round(statistics.median(gaps), 2),
                "gap_us_min_max": [round(min(gaps), 2), round(max(gaps), 2)],
                "replay_ms": round(statistics.median(a.elapsed_time(b) for a, b in replays), 3),
            }
        )
    return rows


def measure_sampling(model: GpuModel, batch: int = 64, repeats: int = 60) -> dict[str, Any]:
    """Microseconds that prologue, logits processing, sampling and epilogue take of a step's graph.

    Three graphs of one step's launches take turns: the whole step, the step without all that comes after the logits,
    and this with eight prologues more. Differences of the times are what the parts cost within a step. (A graph without
    the prologue cannot be run: the buffer of token ids serves others once the embedding has read it.)
    """
    rows: dict[str, Any] = {"batch": batch, "context": CONTEXT, "sampling": "temperature, top-k 50, top-p 0.9, min-p"}
    requests: tuple[tuple[Variant, SamplingInput | None], ...] = (("greedy", None), ("sample", random_sampling(batch)))
    for variant, sampling in requests:
        step = decode_step(batch, CONTEXT, model.num_blocks, sampling)
        model.runner.submit(first_tokens(step)).result()
        model.runner.submit(step).result()
        launches = model.runner.bound(variant, step_size(step)).launches
        prologue = launches[0]
        assert op_name(prologue[0]) == "step_prologue"
        sampler = [pair for pair in launches[1:] if pair[0].sources == ("step",)]
        no_sampler = launches[: -len(sampler)]
        assert launches[-len(sampler) :] == sampler, "the sampler does not come last"
        parts = (launches, no_sampler, [*[prologue] * 8, *no_sampler])
        graphs = [captured([action for _, action in part], model.stream) for part in parts]
        times = _replay_in_turns(graphs, model.stream, repeats)
        whole_ms, model_ms, more_ms = map(statistics.median, times)
        sampling_us = _median_difference_us(times[0], times[1])
        prologue_us = _median_difference_us(times[2], times[1]) / 8
        rows[variant] = {
            "whole_ms": round(whole_ms, 4),
            "without_sampler_ms": round(model_ms, 4),
            "with_8_prologues_more_ms": round(more_ms, 4),
            "sampling_us": round(sampling_us, 1),
            "prologue_us": round(prologue_us, 1),
            "sampling_and_bookkeeping_us": round(sampling_us + prologue_us, 1),
            "launches": [op_name(launch) for launch, _ in [prologue, *sampler]],
        }
    return rows


def _median_difference_us(more: Sequence[float], less: Sequence[float]) -> float:
    return statistics.median((a - b) * 1e3 for a, b in zip(more, less, strict=True))


def _replay_in_turns(
    graphs: Sequence[torch.cuda.CUDAGraph], stream: torch.cuda.Stream, repeats: int
) -> list[list[float]]:
    """Milliseconds of each replay of each graph. The device is kept busy while the first ones are enqueued."""
    events = []
    with torch.cuda.stream(stream):
        for graph in graphs:
            graph.replay()  # the first one instantiates it
        torch.cuda.synchronize()
        torch.cuda._sleep(_AHEAD_CYCLES)
        for _ in range(repeats):
            for place, graph in enumerate(graphs):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graph.replay()
                end.record()
                events.append((place, begin, end))
        torch.cuda.synchronize()
    return [[a.elapsed_time(b) for which, a, b in events if which == place] for place in range(len(graphs))]


def measure_nodes(model: GpuModel, batches: Sequence[int] = (1, 64)) -> list[dict[str, Any]]:
    """Nodes of captured steps, as the driver counts them, beside the kernels that the plan starts."""
    reader = GraphReader()
    rows = []
    variants: tuple[Variant, ...] = ("greedy", "sample")
    for variant in variants:
        for batch in batches:
            sampling = random_sampling(batch) if variant == "sample" else None
            model.runner.submit(first_tokens(decode_step(batch, CONTEXT, model.num_blocks, sampling))).result()
            nodes = step_nodes(model.runner.bound(variant, StepSize((batch,) * 3)), model.stream, reader)
            rows.append(
                {
                    "variant": variant,
                    "batch": batch,
                    "planned_kernels": nodes.num_planned,
                    "captured_nodes": nodes.num_captured,
                    "unexplained": nodes.num_unexplained,
                    "missing": nodes.missing,
                    # Many layers make the same call.
                    "extra_of_library_calls": dict(Counter(" + ".join(names) for names in nodes.extra.values())),
                }
            )
    return rows


def measure_prefill(model: GpuModel, repeats: int = 7) -> dict[str, Any]:
    """Whole prompts in one eager step: milliseconds, TFLOP/s and the share of the bf16 rate, by kind of launch too."""
    rate = product_tflop_s(8192)
    result: dict[str, Any] = {"bf16_mm_tflop_s": round(rate, 1), "steps": []}
    for prompts, length in PREFILLS:
        step = prefill_step(prompts, length)
        run_steps(model, step, 2)
        ms = statistics.median(step_times_ms(model, step, repeats))
        flops = _flops_by_launch(model, step)
        total = sum(flops)
        result["steps"].append(
            {
                "prompts": prompts,
                "tokens_each": length,
                "ms": round(ms, 2),
                "tflop": round(total / 1e12, 2),
                "tflop_s": round(total / ms / 1e9, 1),
                "share_of_bf16_rate": round(total / ms / 1e9 / rate, 3),
                "tokens_per_s": round(prompts * length / ms * 1e3),
                "by_op": _by_op(model, step, flops, rate),
            }
        )
    return result


def _flops_by_launch(model: GpuModel, step: StepInput) -> list[float]:
    """Multiplications and additions of each launch's matrix products; of attention those of keys that a query sees."""
    length = int(step.seq_lens[0])
    visible = len(step.seq_lens) * length * (length + 1) // 2
    bound = model.runner.bound("greedy", step_size(step))
    flops = []
    for launch, _ in bound.launches:
        tensors = [bound.tensors[name] for name in map(value_name, launch.args) if name]
        match op_name(launch):
            case "linear":
                flops.append(2.0 * tensors[0].numel() * tensors[1].shape[0])
            case "paged_attention":
                _, heads, dim = tensors[0].shape[-3:]
                flops.append(4.0 * heads * dim * visible)
            case _:
                flops.append(0.0)
    return flops


def _by_op(model: GpuModel, step: StepInput, flops: Sequence[float], rate: float) -> dict[str, Any]:
    """The same by op: an event between each two launches, which are enqueued while the device is busy."""
    launches = model.runner.bound("greedy", step_size(step)).launches
    us = launch_us([action for _, action in launches], model.stream)
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for (launch, _), time_us, count in zip(launches, us, flops, strict=True):
        row = sums[op_name(launch)]
        row[0] += 1
        row[1] += time_us
        row[2] += count
    rows: dict[str, Any] = {}
    for op, (number, time_us, count) in sorted(sums.items(), key=lambda item: -item[1][1]):
        rows[op] = {"launches": int(number), "ms": round(time_us / 1e3, 3)}
        if count:
            rows[op] |= {
                "tflop_s": round(count / time_us / 1e6, 1),
                "share_of_bf16_rate": round(count / time_us / 1e6 / rate, 3),
            }
    return rows


def launch_us(actions: Sequence[Callable[[], object]], stream: torch.cuda.Stream, repeats: int = 3) -> list[float]:
    """Median microseconds of each action, made one after the other; an event between two takes part of one."""
    runs = []
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(repeats):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(len(actions) + 1)]
            torch.cuda._sleep(_AHEAD_CYCLES)
            events[0].record()
            for action, event in zip(actions, events[1:], strict=True):
                action()
                event.record()
            torch.cuda.synchronize()
            runs.append([a.elapsed_time(b) * 1e3 for a, b in zip(events, events[1:], strict=False)])
    return [statistics.median(times) for times in zip(*runs, strict=True)]
