"""Whole engines whose steps are recorded: golden tokens at bucket edges, whatever runs ahead."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graphserve.config import EngineConfig
from graphserve.plan.runner import StepSize
from graphserve.runtime.buckets import CaptureBuckets
from graphserve.runtime.load import LoadedModel, load_model
from graphserve.runtime.memory_plan import SCRATCH_BYTES_PER_LOGIT, device_workspace_bytes
from graphserve.runtime.step_input import CARRIED, SamplingInput
from graphserve.sampling_params import RequestOutputKind, SamplingParams
from tests.runtime.recorded_engine import recorded_engine
from tests.runtime.step_models import decode_step, table_runner

BASE = ("stories260K", "stories260K-hd64", "stories260K-mistral-swa64", "stories260K-mixtral-exact")
CHAT = ("stories-qwen3-chat", "stories-qwen3-moe")
Golden = tuple[LoadedModel, list[dict[str, Any]], dict[str, Any]]


def load_golden(folder: Path) -> Golden:
    options = {"model": str(folder), "dtype": "float32"}
    loaded = load_model(EngineConfig.from_kwargs(**options), backend="reference")
    is_base = folder.name in BASE
    content = json.loads((folder / ("golden.json" if is_base else "golden_chat.json")).read_text())
    return loaded, content["cases" if is_base else "base"], options


@pytest.fixture(scope="module")
def small_model(shared_models: Path) -> Iterator[Golden]:
    golden = load_golden(shared_models / "stories260K")
    yield golden
    golden[0].model_runner.close()


def run_at_once(golden: Golden, count: int, most: int, **options: Any) -> Any:
    """``count`` requests that begin together; checks every token and returns the runner."""
    loaded, cases, model_options = golden
    config = EngineConfig.from_kwargs(**model_options, **options)
    engine, runner = recorded_engine(loaded, config)
    chosen = [cases[i % len(cases)] for i in range(count)]
    for index, case in enumerate(chosen):
        params = SamplingParams(temperature=0, max_tokens=most, output_kind=RequestOutputKind.FINAL_ONLY)
        engine.add_request(str(index), {"prompt_token_ids": case["prompt_token_ids"]}, params)
    done = {}
    while len(done) < count:
        done |= {int(output.request_id): output for output in engine.step()}
    for index, case in enumerate(chosen):
        assert done[index].error is None
        assert done[index].outputs[0].token_ids == case["token_ids"][:most]
    engine.close()
    return runner


@pytest.mark.parametrize("bucket", [4, 8])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_golden_tokens_at_bucket_edges(small_model: Golden, bucket: int, offset: int) -> None:
    runner = run_at_once(small_model, bucket + offset, most=12, max_num_seqs=16)
    assert runner.num_eager_steps == 0, "every step was replayed"
    assert runner.num_variant_steps["greedy"] == runner.num_variant_steps.total() > 0


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", BASE + CHAT)
def test_golden_tokens_of_every_model_at_every_bucket_edge(shared_models: Path, model: str) -> None:
    golden = load_golden(shared_models / model)
    buckets = CaptureBuckets(64).decode_sizes
    for count in sorted({min(max(bucket + offset, 1), 64) for bucket in buckets for offset in (-1, 0, 1)}):
        runner = run_at_once(golden, count, most=20, max_num_seqs=64)
        assert runner.num_variant_steps["greedy"] == runner.num_variant_steps.total() > 0
    golden[0].model_runner.close()


def run_disturbed(golden: Golden, count: int, most: int, seed: int, **options: Any) -> Any:
    """Requests that arrive, and are aborted, at random steps, on a stream with random delays and too small a pool."""
    loaded, cases, model_options = golden
    rng = random.Random(seed)
    longest = max(len(case["prompt_token_ids"]) for case in cases) + most
    config = EngineConfig.from_kwargs(**model_options, num_gpu_blocks_override=3 * -(-longest // 16), **options)
    engine, runner = recorded_engine(loaded, config, delays=rng)
    chosen = [rng.choice(cases) for _ in range(count)]
    arrivals = sorted(((rng.randrange(20), i) for i in range(count)), reverse=True)
    aborts = {i: rng.randrange(3, 30) for i in rng.sample(range(count), count // 4)}
    waiting, step = set(range(count)), 0
    while waiting:
        while arrivals and arrivals[-1][0] <= step:
            index = arrivals.pop()[1]
            params = SamplingParams(temperature=0, max_tokens=most, output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(str(index), {"prompt_token_ids": chosen[index]["prompt_token_ids"]}, params)
        present = {i for i in waiting if i not in {i for _, i in arrivals}}
        for index in [i for i in present if aborts.get(i, step + 1) <= step]:
            engine.abort(str(index))
            waiting.discard(index)
        for output in engine.step():
            index = int(output.request_id)
            assert output.error is None and output.outputs[0].token_ids == chosen[index]["token_ids"][:most]
            waiting.discard(index)
        step += 1
    assert engine.stats().num_preemptions_total > 0
    engine.close()
    return runner


def test_golden_tokens_with_delays_aborts_and_preemptions(small_model: Golden) -> None:
    run_disturbed(small_model, count=16, most=24, seed=5, max_num_seqs=8)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", BASE + CHAT)
def test_golden_tokens_of_every_model_with_delays_aborts_and_preemptions(shared_models: Path, model: str) -> None:
    golden = load_golden(shared_models / model)
    for seed, max_num_seqs in enumerate((7, 8, 9, 17)):
        run_disturbed(golden, count=32, most=64, seed=seed, max_num_seqs=max_num_seqs)
    golden[0].model_runner.close()


def test_larger_steps_launch_the_same_plan_eagerly(small_model: Golden) -> None:
    runner = run_at_once(small_model, 8, most=4, max_num_seqs=8, enforce_eager=True)
    assert runner.num_eager_steps > 0


def test_log_probabilities_are_those_of_the_golden_files(small_model: Golden) -> None:
    loaded, cases, options = small_model
    engine, runner = recorded_engine(loaded, EngineConfig.from_kwargs(**options, max_num_seqs=4))
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=5, output_kind=RequestOutputKind.FINAL_ONLY)
    engine.add_request("a", {"prompt_token_ids": cases[0]["prompt_token_ids"]}, params)
    outputs: list[Any] = []
    while not outputs:
        outputs = engine.step()
    entries = outputs[0].outputs[0].logprobs
    for entry, expected in zip(entries, cases[0]["top5"][:8], strict=True):
        assert list(entry)[:5] == [token for token, _ in expected]
        assert [entry[token].logprob for token, _ in expected] == pytest.approx([x for _, x in expected], abs=1e-3)
    assert runner.num_variant_steps["logprobs"] == runner.num_variant_steps.total()


def test_buffers_and_inputs_take_what_the_memory_plan_says(small_model: Golden) -> None:
    loaded, _, options = small_model
    config = EngineConfig.from_kwargs(**options, max_num_seqs=24, max_num_batched_tokens=300)
    engine, runner = recorded_engine(loaded, config)
    plan = loaded.model_runner.plan
    planned = device_workspace_bytes(plan, config, loaded.max_model_len)
    rows = runner.limits.max_rows
    assert planned - rows * plan.model["vocab_size"] * SCRATCH_BYTES_PER_LOGIT == runner.workspace_bytes
    engine.close()


def table(vocab: int = 40) -> torch.Tensor:
    return torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(1))


def test_a_size_is_recorded_on_an_idle_device_or_after_some_eager_steps() -> None:
    runner = table_runner(table(), max_in_flight=6, record_after=2)
    first = runner.submit(decode_step([1], SamplingInput(1)))
    assert runner.num_eager_steps == 0, "the device was idle"
    for expected in (1, 2, 2, 2):
        runner.submit(decode_step([1, 2], SamplingInput(2))).result()
        assert runner.num_eager_steps == expected
    first.result()


def test_more_steps_than_slots_are_refused() -> None:
    runner = table_runner(table(), max_in_flight=2)
    steps = [runner.submit(decode_step([1], SamplingInput(1))) for _ in range(2)]
    with pytest.raises(AssertionError, match="more than 2 steps in flight"):
        runner.submit(decode_step([1], SamplingInput(1)))
    assert steps[0].result() == steps[1].result()


def test_recording_changes_no_lane_and_no_result() -> None:
    runner = table_runner(table(), max_in_flight=3)
    waiting = runner.submit(decode_step([5, 6], SamplingInput(2)))
    runner.record([StepSize((4, 4, 4)), StepSize((1, 1, 1))], ["greedy", "sample", "logprobs", "bitmask", "split"])
    expected = table()[[5, 6]].argmax(-1)
    carried = runner.submit(decode_step([CARRIED, CARRIED], SamplingInput(2)))
    assert waiting.result().token_ids == expected.tolist()
    assert carried.result().token_ids == table()[expected].argmax(-1).tolist()


def test_sizes_outside_the_buckets_are_not_recorded() -> None:
    runner = table_runner(table(), buckets=CaptureBuckets(16, [4]))
    runner.submit(decode_step([1, 2, 3, 4], SamplingInput(4))).result()
    assert runner.num_eager_steps == 0
    runner.submit(decode_step([1, 2, 3], SamplingInput(3))).result()
    assert runner.num_eager_steps == 1
