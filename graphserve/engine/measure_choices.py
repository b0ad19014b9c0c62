"""``graphserve warmup --measure``: time how decode steps run fastest on the device at hand."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import msgspec
import numpy as np
import torch

from graphserve.config import EngineConfig
from graphserve.engine.executor import Executor
from graphserve.engine.llm_engine import LLMEngine
from graphserve.engine.make_executor import make_executor
from graphserve.plan.schema import Plan
from graphserve.processors import usable_threads
from graphserve.progress import phase
from graphserve.runtime.choices import DEFAULT, NUM_SEQS, MeasuredChoices, StepChoice, product_name
from graphserve.runtime.launch_specs import op_name, value_name
from graphserve.runtime.load import load_model
from graphserve.runtime.step_input import SamplingInput, StepInput

logger = logging.getLogger(__name__)

CONTEXT = 1024  # tokens of each sequence, or half of what the model holds
MAX_VECTOR_SEQS = 4  # a vector kernel reads the weight once a row, the library's product once
# Of attention: more are several times what fills a device, and each takes scratch memory that no plan counts.
MAX_PROGRAMS = 8192

# A choice is kept if it wins every one of some rounds by this share: a noisy machine leaves the default.
NUM_ROUNDS, LEAST_GAIN = 3, 0.01
_NUM_STEPS, _NUM_WARM_STEPS = 6, 2

# From the best choice so far to one that may be better.
Move = Callable[[StepChoice], StepChoice]


def measure_choices(config: EngineConfig) -> MeasuredChoices:
    """Load the model and time its decode steps.

    Raises:
        GraphserveError: the model cannot be loaded.
    """
    config = msgspec.structs.replace(config, skip_tokenizer_init=True)
    loaded = load_model(config)
    device, plan = loaded.model_runner.device, loaded.model_runner.plan
    executor = make_executor(config, loaded.model_runner)
    engine = LLMEngine(config, executor, None, loaded.max_model_len, loaded.generation_defaults, loaded.memory.kv_bytes)
    try:
        buckets = executor.buckets(config.max_num_seqs)
        sizes = sorted({buckets.rows(n) for n in NUM_SEQS if n <= config.max_num_seqs})
        context = min(CONTEXT, loaded.max_model_len // 2)
        chosen: dict[int, StepChoice] = {}
        with phase("measure choices", total=len(sizes), unit="step sizes") as work:
            for num_seqs in sizes:
                step = decode_step(num_seqs, context, engine.num_blocks, config.block_size, len(plan.cache_groups))
                choice = best_choice(executor, step, list(moves(plan, device, num_seqs)))
                if choice != DEFAULT:
                    logger.info("decode steps of %d sequences run faster with %s", num_seqs, choice)
                chosen[num_seqs] = choice
                work.advance()
            better = sum(choice != DEFAULT for choice in chosen.values())
            work.note = f"{better} of {len(sizes)} step sizes run otherwise than by default"
        return MeasuredChoices(chosen)
    finally:
        engine.close()


def moves(plan: Plan, device: torch.device, num_seqs: int) -> Iterator[Move]:
    """What may be better than the default for steps of so many sequences."""
    if device.type == "cpu":
        num_threads = 1
        while num_threads < usable_threads():
            yield partial(msgspec.structs.replace, num_threads=num_threads)
            num_threads *= 2
        return
    from graphserve.runtime.triton_plan import DECODE_SEGMENTS, MAX_GEMV_ROWS

    num_programs = num_seqs * max((spec.kv_heads for spec in plan.cache_layers), default=0)
    for _, segments in DECODE_SEGMENTS:
        if num_programs * segments <= MAX_PROGRAMS:
            yield partial(msgspec.structs.replace, segments=segments)
    if num_seqs > MAX_VECTOR_SEQS:
        return
    linears = [launch for launch in plan.launches if op_name(launch) == "linear"]
    weights = [plan.weights[name] for x in linears if (name := value_name(x.args[1])) in plan.weights]
    products = sorted({product_name(weight.spec.shape) for weight in weights})
    by_default = tuple(products) if num_seqs <= MAX_GEMV_ROWS else ()
    for product in products:
        yield partial(_by_other_kernel, product, by_default)


def _by_other_kernel(product: str, by_default: tuple[str, ...], choice: StepChoice) -> StepChoice:
    before = by_default if choice.vector_products is None else choice.vector_products
    return msgspec.structs.replace(choice, vector_products=tuple(sorted({*before} ^ {product})))


def best_choice(
    executor: Executor, step: StepInput, alternatives: list[Move], clock: Callable[[], float] = time.perf_counter
) -> StepChoice:
    """Try one move after the other, each from the best choice so far.

    Args:
        clock: gives seconds.
    """
    num_seqs = step.num_sequences

    def seconds(choice: StepChoice) -> float:
        executor.use_choices(MeasuredChoices({num_seqs: choice}))
        return step_seconds(executor, step, clock)

    def wins(candidate: StepChoice, best: StepChoice) -> bool:
        return seconds(candidate) < seconds(best) * (1 - LEAST_GAIN)

    best = DEFAULT
    for move in alternatives:
        candidate = move(best)
        if candidate != best and all(wins(candidate, best) for _ in range(NUM_ROUNDS)):
            best = candidate
    executor.use_choices(MeasuredChoices())
    return best


def step_seconds(executor: Executor, step: StepInput, clock: Callable[[], float]) -> float:
    """Median time from the end of one step to that of the next, as many in flight as the executor takes."""
    handles: deque = deque()
    ends: list[float] = []
    for _ in range(1 + _NUM_WARM_STEPS + _NUM_STEPS):
        if len(handles) == executor.max_in_flight:
            handles.popleft().result()
            ends.append(clock())
        handles.append(executor.submit(step))
    while handles:
        handles.popleft().result()
        ends.append(clock())
    return median(b - a for a, b in zip(ends[_NUM_WARM_STEPS:], ends[_NUM_WARM_STEPS + 1 :], strict=False))


def decode_step(num_seqs: int, context: int, num_blocks: int, block_size: int, num_groups: int) -> StepInput:
    """A greedy step of one more token for each sequence; its results mean nothing.

    Where the pool is smaller than all contexts together, sequences share blocks.
    """
    per_seq = -(-context // block_size)
    table = (np.arange(num_seqs * per_seq) % (num_blocks - 1) + 1).reshape(num_seqs, per_seq).astype(np.int32)
    position = context - 1
    slots = table[:, -1].astype(np.int64) * block_size + position % block_size
    lanes = np.arange(num_seqs, dtype=np.int32)
    return StepInput(
        input_ids=np.zeros(num_seqs, np.int64),
        positions=np.full(num_seqs, position, np.int64),
        query_start_loc=np.arange(num_seqs + 1, dtype=np.int32),
        seq_lens=np.full(num_seqs, context, np.int32),
        block_tables=[table] * num_groups,
        slot_mappings=[slots] * num_groups,
        logits_indices=np.arange(num_seqs, dtype=np.int64),
        token_lanes=lanes,
        row_lanes=lanes,
        sampling=SamplingInput(num_seqs),
        num_tokens=num_seqs,
        num_sequences=num_seqs,
        num_logits_rows=num_seqs,
    )
