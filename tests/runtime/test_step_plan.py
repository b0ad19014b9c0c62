"""A step as one plan gives, token for token, what the sampler gives for the model's logits, in every variant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import random_limits, random_scores

from graphserve.kernels import register_all
from graphserve.runtime.device_runner import variant_of
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.launch_specs import tensor_names
from graphserve.runtime.sampler import Sampler
from graphserve.runtime.step_input import (
    ALL_LOGPROBS,
    CARRIED,
    INVALID_TOKEN,
    NO_LOGPROBS,
    LogitsAdjustment,
    PromptLogprobsRows,
    SamplingInput,
    StepOutput,
    sampling_keys,
)
from graphserve.runtime.step_plan import VARIANTS, StepLimits, Variant, step_plan
from graphserve.runtime.triton_plan import lower_to_triton
from tests.compiler.compiled import compiled_tiny
from tests.runtime.step_models import BLOCK_SIZE, CPU, FIRST_SLOT, decode_step, table_plan, table_runner

register_all()
LIMITS = StepLimits(num_lanes=8, max_rows=16)


def assert_equal_outputs(ours: StepOutput, expected: StepOutput) -> None:
    assert ours.token_ids == expected.token_ids
    assert (ours.logprobs is None) == (expected.logprobs is None)
    for a, b in zip(ours.logprobs or (), expected.logprobs or (), strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.token_ids == b.token_ids and a.rank == b.rank
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert ours.prompt_logprobs.keys() == expected.prompt_logprobs.keys()


def random_adjustment(rng: np.random.Generator, row: int, vocab: int, with_allowed: bool) -> LogitsAdjustment:
    def ids(most: int) -> Any:
        return rng.permutation(vocab)[: rng.integers(1, most + 1)].astype(np.int64)

    adjustment = LogitsAdjustment(row)
    if with_allowed:
        adjustment.allowed_ids = ids(vocab)
    if rng.random() < 0.5:
        adjustment.banned_ids = ids(vocab // 2)
    if rng.random() < 0.5:
        adjustment.bias_ids = ids(5)
        adjustment.bias_values = rng.standard_normal(len(adjustment.bias_ids)).astype(np.float32)
    if rng.random() < 0.5:
        adjustment.seen_ids = ids(vocab)
        adjustment.repetition_penalty = float(rng.uniform(0.5, 2))
    if rng.random() < 0.5:
        adjustment.output_ids = ids(9)
        adjustment.output_counts = rng.integers(1, 5, len(adjustment.output_ids)).astype(np.float32)
        adjustment.frequency_penalty, adjustment.presence_penalty = rng.uniform(-1, 1, 2)
    return adjustment


def random_sampling(rng: np.random.Generator, rows: int, vocab: int, variant: str) -> SamplingInput:
    sampling = SamplingInput(rows)
    if variant == "greedy":
        return sampling
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    top_k, top_p, log_min_p = random_limits(generator, rows, vocab)
    sampling.is_greedy = False
    sampling.temperature = rng.choice([0.0, 0.5, 1.0, 1.7], rows).astype(np.float32)
    sampling.top_k, sampling.top_p, sampling.min_p = top_k.numpy(), top_p.numpy(), log_min_p.exp().numpy()
    sampling.keys = sampling_keys(list(range(rows)), rng.integers(0, 99, rows).tolist())
    chosen = [row for row in range(rows) if rng.random() < 0.7] or [0]
    sampling.adjustments = [random_adjustment(rng, row, vocab, variant == "bitmask") for row in chosen]
    if variant in ("logprobs", "split"):
        most = ALL_LOGPROBS if variant == "split" else 3
        sampling.num_logprobs = [most, *rng.choice([NO_LOGPROBS, 0, 3], rows - 1).tolist()]
    return sampling


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), rows=st.integers(1, 6), vocab=st.sampled_from([33, 200]))
def test_a_step_gives_the_samplers_tokens(variant: str, seed: int, rows: int, vocab: int) -> None:
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    wants_ranking = variant in ("logprobs", "split")  # equal logits have no fixed order in a report
    table = (
        torch.randn(vocab, vocab, generator=generator) * 3 if wants_ranking else random_scores(generator, vocab, vocab)
    )
    ids = rng.integers(0, vocab, rows)
    sampling = random_sampling(rng, rows, vocab, variant)
    assert variant_of(sampling, LIMITS) == variant
    runner = table_runner(table)
    for num_rows in (rows, 8):
        ours = runner.submit(decode_step(ids.tolist(), sampling, num_rows=num_rows)).result()
        assert_equal_outputs(ours, Sampler()(table[torch.from_numpy(ids)], sampling))
    assert runner.num_variant_steps[variant] == 2 and runner.num_eager_steps == 0
    runner.close()


def test_prompt_logprobs_are_reported_by_a_split_step() -> None:
    table = torch.randn(50, 50, generator=torch.Generator().manual_seed(1))
    sampling = SamplingInput(1)
    sampling.prompt_logprobs = [PromptLogprobsRows(2, 1, np.array([4, 9]), 3)]
    assert variant_of(sampling, LIMITS) == "split"
    runner = table_runner(table)
    ours = runner.submit(decode_step([5, 6, 7], sampling)).result()
    expected = Sampler()(table[[5, 6, 7]], sampling)
    assert ours.prompt_logprobs == expected.prompt_logprobs and ours.token_ids == expected.token_ids


def test_rows_beyond_the_devices_limits_split_the_step() -> None:
    limits = StepLimits(num_lanes=2, max_rows=4, max_list_ids=8, max_logprobs=5)
    adjustments = [LogitsAdjustment(row, banned_ids=np.arange(5)) for row in range(2)]
    assert variant_of(SamplingInput(2, adjustments=adjustments[:1]), limits) == "sample"
    assert variant_of(SamplingInput(2, adjustments=adjustments), limits) == "split"
    assert variant_of(SamplingInput(1, num_logprobs=[5]), limits) == "logprobs"
    assert variant_of(SamplingInput(1, num_logprobs=[6]), limits) == "split"


@pytest.mark.parametrize("rows", [1, 5])
def test_carried_tokens_give_what_given_ones_give(rows: int) -> None:
    """A chain of steps that never learns its tokens, against one that is told each of them."""
    table = torch.randn(60, 60, generator=torch.Generator().manual_seed(rows)) * 2
    lanes = [7, 2, 0, 5, 3][:rows]
    told, blind = table_runner(table), table_runner(table, max_in_flight=3)
    ids = list(range(10, 10 + rows))
    chain, waiting = [], []
    for position in range(12):
        sampling = SamplingInput(
            rows,
            is_greedy=False,
            temperature=np.ones(rows, np.float32),
            top_k=np.zeros(rows, np.int64),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            keys=sampling_keys(list(range(rows)), [position] * rows),
        )
        chain.append(told.submit(decode_step(ids, sampling, lanes)).result().token_ids)
        given = ids if position == 0 else [CARRIED] * rows
        if len(waiting) == 3:
            assert waiting.pop(0).result().token_ids == chain[position - 3]
        waiting.append(blind.submit(decode_step(given, sampling, lanes, num_rows=8)))
        ids = chain[-1]
    assert [step.result().token_ids for step in waiting] == chain[-3:]


def test_a_lane_that_ended_gives_nothing_to_the_steps_behind_it() -> None:
    """Token 3 follows 2 follows 1; the stop id 2 ends lane 0 before the host knows."""
    table = torch.eye(6).roll(1, dims=1)
    runner = table_runner(table)
    stops = SamplingInput(2, stop_ids=np.array([[2, -1], [-1, -1]], np.int32))
    first = runner.submit(decode_step([1, 1], stops))
    second = runner.submit(decode_step([CARRIED, CARRIED], stops))
    assert first.result().token_ids == [2, 2]
    assert runner.kv_cache is not None
    block = runner.kv_cache.layers[0][0][FIRST_SLOT // BLOCK_SIZE, 0]
    assert block.argmax(-1).tolist()[:2] == [2, 3], "slot 0 still holds token 1, slot 1 already token 2"
    assert second.result().token_ids[1] == 3
    again = runner.submit(decode_step([1, CARRIED], SamplingInput(2)))
    assert again.result().token_ids == [2, 4], "a new request may use the lane"


def test_impossible_rows_are_invalid_and_end_their_lane() -> None:
    table = torch.zeros(4, 4)
    table[1] = torch.nan
    runner = table_runner(table)
    assert runner.submit(decode_step([1, 2], SamplingInput(2))).result().token_ids == [INVALID_TOKEN, 0]
    assert runner.submit(decode_step([CARRIED, CARRIED], SamplingInput(2))).result().token_ids == [0, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_launch_of_a_step_has_a_kernel(variant: Any) -> None:
    plan = step_plan(table_plan(300), variant, LIMITS).plan
    lowered = lower_to_triton(plan, KVCache(plan, 2, 16, CPU), "cuda:90")
    assert lowered.refusals == {}
    names = {kernel.symbol[3:-17] for kernels in lowered.kernels.values() for kernel in kernels}
    assert {"step_prologue", "step_epilogue"} <= names
    assert ("sampling_cut" in names) == (variant != "greedy") and ("top_logprobs_block" in names) == (
        variant in ("logprobs", "bitmask")
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_kernel_takes_every_tensor_of_its_launch(variant: Variant) -> None:
    """An argument whose shape the lowering cannot say must not be taken for an absent one."""
    plan = step_plan(compiled_tiny("llama").plan, variant, StepLimits(8, max_rows=8, num_slots=3)).plan
    lowered = lower_to_triton(plan, KVCache(plan, 2, 16, torch.device("meta")), "cuda:90")
    assert lowered.refusals == {}
    for index, kernels in lowered.kernels.items():
        launch = lowered.plan.launches[index]
        names = tensor_names(launch)
        taken = {a.source for kernel in kernels for a in kernel.arguments}
        left = [name for i, name in enumerate(names) if name and i not in taken]
        assert left == [], f"{launch.op} leaves {left} out"
