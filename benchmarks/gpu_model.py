"""An 8B Llama shape with random weights on the device, and steps of it as the engine runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import transformers

from benchmarks.embedded_demo import demo_config, embedded_eps
from graphserve.artifacts import open_store
from graphserve.compiler.build import build_plan
from graphserve.compiler.capture import register_interfaces
from graphserve.models.meta_model import build_meta_model, non_persistent_buffers
from graphserve.models.rope import bake_rope
from graphserve.plan.runner import StepSize
from graphserve.plan.schema import Plan
from graphserve.runtime.buckets import CaptureBuckets
from graphserve.runtime.cuda_graphs import CudaGraphs
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.step_graphs import GraphKey
from graphserve.runtime.step_input import CARRIED, SamplingInput, StepInput, sampling_keys
from graphserve.runtime.step_lowering import TritonLowering
from graphserve.runtime.weight_memory import NO_COPY
from tests.compiler.published_configs import LLAMA_3_1_8B, published

LAYERS, BLOCK_SIZE, MAX_MODEL_LEN = 32, 16, 4352
MAX_SEQS, MAX_TOKENS = 256, 8192  # of a step
KV_SHARE = 0.85  # of the memory that is free once the weights are loaded
NO_END = 1 << 20  # tokens left: no request ends

ParameterStream = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class TimedGraphs(CudaGraphs):
    """Captured graphs whose replays can be watched.

    Attributes:
        replays: while a list, each replay adds the events before and behind it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replays: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None

    def replay(self, key: GraphKey) -> None:
        if self.replays is None:
            super().replay(key)
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        super().replay(key)
        end.record()
        self.replays.append((begin, end))


@dataclass
class GpuModel:
    """A model whose steps run on the device.

    Attributes:
        runner: has a KV pool of ``num_blocks`` blocks filled with random numbers; graphs of the default buckets are
            captured when they are first needed.
        weight_bytes: of all weights.
        engine_bytes: device memory that all of it took before the first capture, as the driver says.
        seconds: what making it took, by phase.
        use_weights: makes other weights at the same addresses, which captured graphs read.
        sleep, wake_up: give the memory of weights and KV pool back, and take it again; the weights are made anew.
    """

    config: transformers.PretrainedConfig
    plan: Plan
    runner: DeviceRunner
    stream: torch.cuda.Stream
    graphs: TimedGraphs
    num_blocks: int
    bytes_per_block: int
    weight_bytes: int
    engine_bytes: int
    seconds: dict[str, float]
    use_weights: Callable[[ParameterStream], None]
    sleep: Callable[[], None]
    wake_up: Callable[[], None]
    close: Callable[[], None]


def model_config(layers: int = LAYERS) -> transformers.PretrainedConfig:
    """The shape of Llama-3.1-8B, with the rotary base and epsilon of the demo model, which can be embedded in it."""
    changes = {"num_hidden_layers": layers, "max_position_embeddings": MAX_MODEL_LEN, "rope_scaling": None}
    config = published(LLAMA_3_1_8B | changes | {"rms_norm_eps": embedded_eps(4096)})
    config.rope_parameters = demo_config().rope_parameters
    return config


def load_model(layers: int = LAYERS) -> GpuModel:
    """Build, lower and allocate the model; takes most of the device's memory."""
    clock = _Phases()
    free_bytes = torch.cuda.mem_get_info()[0]
    register_interfaces()
    config = model_config(layers)
    meta = build_meta_model(config, torch.bfloat16)
    bake_rope(meta, MAX_MODEL_LEN)
    shapes = {name: parameter.shape for name, parameter in meta.named_parameters()}
    built = build_plan(meta, MAX_MODEL_LEN, non_persistent_buffers(meta))
    clock.end("build plan")
    device = torch.device("cuda")
    sources: list[ParameterStream] = [lambda: weights_on_device(shapes)]
    model_runner = ModelRunner(built.plan, lambda: sources[-1](), built.constants, device=device)
    torch.cuda.synchronize()
    clock.end("make weights")
    spec = built.plan.cache_layers[0]
    bytes_per_block = 2 * BLOCK_SIZE * spec.kv_heads * (spec.k_dim + spec.v_dim) * layers
    most = MAX_SEQS * MAX_MODEL_LEN // BLOCK_SIZE + 1
    num_blocks = min(most, int(torch.cuda.mem_get_info()[0] * KV_SHARE) // bytes_per_block)
    stream, graphs = torch.cuda.Stream(device), TimedGraphs()
    runner = DeviceRunner(
        built.plan,
        model_runner.weights,
        device,
        lowering=TritonLowering(device, stream, open_store()),
        graphs=lambda scalars: graphs,
        stream=stream,
    )
    runner.allocate(
        num_blocks, BLOCK_SIZE, StepSize((MAX_TOKENS, MAX_SEQS, MAX_SEQS)), MAX_SEQS, CaptureBuckets(MAX_SEQS)
    )
    kv_cache = runner.kv_cache
    assert kv_cache is not None
    with torch.inference_mode(), torch.cuda.stream(stream):  # behind the zeros that the pool began with
        for keys, values in kv_cache.layers:
            keys.normal_()
            values.normal_()
    torch.cuda.synchronize()
    clock.end("compile kernels and fill the cache")

    def use_weights(source: ParameterStream) -> None:
        sources.append(source)
        model_runner.weight_memory.sleep(NO_COPY)
        model_runner.weight_memory.wake_up()

    def sleep() -> None:
        model_runner.weight_memory.sleep(NO_COPY)
        kv_cache.unmap()

    def wake_up() -> None:
        model_runner.weight_memory.wake_up()
        kv_cache.map()

    def close() -> None:
        runner.close()
        model_runner.close()
        kv_cache.unmap()
        torch.cuda.empty_cache()

    return GpuModel(
        config,
        built.plan,
        runner,
        stream,
        graphs,
        num_blocks,
        bytes_per_block,
        model_runner.weight_bytes,
        free_bytes - torch.cuda.mem_get_info()[0],
        clock.seconds,
        use_weights,
        sleep,
        wake_up,
        close,
    )


class _Phases:
    """Seconds of what is done one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._begin = round(now - self._begin, 2), now


def weights_on_device(shapes: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
    """Norm weights of 1, matrices of standard deviation 0.02, made where they are used."""
    for name, shape in shapes.items():
        weight = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
        yield name, weight if len(shape) == 1 else weight.normal_(0, 0.02)


def decode_step(batch: int, context: int, num_blocks: int, sampling: SamplingInput | None = None) -> StepInput:
    """One step of ``batch`` sequences at the end of ``context`` tokens, greedy by default.

    Where the pool is smaller than all contexts together, later sequences read earlier ones' blocks again.
    """
    per_seq = -(-context // BLOCK_SIZE)
    wanted = np.arange(batch * per_seq, dtype=np.int64).reshape(batch, per_seq)
    table = (wanted % (num_blocks - 1) + 1).astype(np.int32)
    # The new token of each sequence has a block of its own, so that no two write to one place.
    table[:, -1] = np.arange(1, batch + 1)
    return carried_step(table, np.full(batch, context - 1, np.int64), sampling)


def carried_step(
    table: npt.NDArray[np.int32], positions: npt.NDArray[np.int64], sampling: SamplingInput | None = None
) -> StepInput:
    """One more token for each sequence, after those that the step before sampled for the same lanes.

    Args:
        table: blocks of each sequence, ``[batch, blocks]``.
        positions: of the tokens that are carried, ``[batch]``.
    """
    batch = len(positions)
    lanes = np.arange(batch, dtype=np.int32)
    return StepInput(
        input_ids=np.full(batch, CARRIED, np.int64),
        positions=positions,
        query_start_loc=np.arange(batch + 1, dtype=np.int32),
        seq_lens=(positions + 1).astype(np.int32),
        block_tables=[table],
        slot_mappings=[_slots(table, lanes, positions)],
        logits_indices=np.arange(batch, dtype=np.int64),
        token_lanes=lanes,
        row_lanes=lanes,
        sampling=_endless(sampling or SamplingInput(batch)),
        num_tokens=batch,
        num_sequences=batch,
        num_logits_rows=batch,
    )


def distinct_share(batch: int, context: int, num_blocks: int) -> float:
    """Share of a decode step's blocks that no other of its sequences reads."""
    return min(1.0, (num_blocks - 1) / (batch * -(-context // BLOCK_SIZE)))


def prefill_step(prompts: int, length: int) -> StepInput:
    """One greedy step of whole prompts of random tokens; each samples its first token."""
    tokens = np.random.default_rng(0).integers(10, 100_000, (prompts, length))
    return prompt_step(tokens.tolist(), block_table(prompts, length))


def prompt_step(prompts: Sequence[Sequence[int]], table: npt.NDArray[np.int32]) -> StepInput:
    """One greedy step of whole prompts; the first token of each is sampled for the lane of its number."""
    lengths = np.array([len(prompt) for prompt in prompts])
    rows = np.repeat(np.arange(len(prompts)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int64)
    ends = np.cumsum(lengths)
    return StepInput(
        input_ids=np.concatenate([np.array(prompt, np.int64) for prompt in prompts]),
        positions=positions,
        query_start_loc=np.concatenate([[0], ends]).astype(np.int32),
        seq_lens=lengths.astype(np.int32),
        block_tables=[table],
        slot_mappings=[_slots(table, rows, positions)],
        logits_indices=(ends - 1).astype(np.int64),
        token_lanes=np.full(len(positions), MAX_SEQS, np.int32),
        row_lanes=np.arange(len(prompts), dtype=np.int32),
        sampling=_endless(SamplingInput(len(prompts))),
        num_tokens=len(positions),
        num_sequences=len(prompts),
        num_logits_rows=len(prompts),
    )


def block_table(batch: int, length: int) -> npt.NDArray[np.int32]:
    """Blocks of their own for sequences of a length, ``[batch, blocks]``."""
    per_seq = -(-length // BLOCK_SIZE)
    return np.arange(1, batch * per_seq + 1, dtype=np.int32).reshape(batch, per_seq)


def _slots(
    table: npt.NDArray[np.int32], rows: npt.NDArray[Any], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Where the keys and values of tokens go, given each one's sequence and position."""
    return table[rows, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


def random_sampling(batch: int) -> SamplingInput:
    """Every row at temperature 0.8 with top-k, top-p and min-p."""
    return SamplingInput(
        batch,
        is_greedy=False,
        temperature=np.full(batch, 0.8, np.float32),
        top_k=np.full(batch, 50, np.int64),
        top_p=np.full(batch, 0.9, np.float32),
        min_p=np.full(batch, 0.01, np.float32),
        keys=sampling_keys(list(range(batch)), [1] * batch),
    )


def first_tokens(step: StepInput) -> StepInput:
    """The step with token ids of its own, so that its lanes have tokens to carry."""
    ids = np.random.default_rng(0).integers(10, 100_000, len(step.input_ids))
    return msgspec.structs.replace(step, input_ids=ids)


def step_size(step: StepInput) -> StepSize:
    """Tokens, rows and sequences."""
    return StepSize((len(step.input_ids), len(step.logits_indices), len(step.seq_lens)))


def run_steps(model: GpuModel, step: StepInput, count: int, after: Callable[[], Any] = lambda: None) -> list[int]:
    """Submit a step ``count`` times as an engine does, the host one step behind; the last step's tokens.

    Args:
        after: called after each submission.

    Raises:
        RuntimeError: a token is missing, since its logits were not finite.
    """
    before = None
    for _ in range(count):
        handle = model.runner.submit(step)
        after()
        if before is not None:
            before.result()
        before = handle
    assert before is not None, "no step"
    tokens = before.result().token_ids
    if len(tokens) != step.num_logits_rows or min(tokens) < 0:
        raise RuntimeError(f"tokens {tokens[:8]} of {step.num_logits_rows} rows: the logits were not finite")
    return tokens


def step_times_ms(model: GpuModel, step: StepInput, count: int) -> list[float]:
    """Milliseconds from the end of each step to the end of the next, by events on the stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    waiting = iter(events)
    next(waiting).record(model.stream)
    run_steps(model, step, count, lambda: next(waiting).record(model.stream))
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def _endless(sampling: SamplingInput) -> SamplingInput:
    rows = sampling.num_rows
    stop_ids, tokens_left = np.full((rows, 1), -1, np.int32), np.full(rows, NO_END, np.int32)
    return msgspec.structs.replace(sampling, stop_ids=stop_ids, tokens_left=tokens_left)
