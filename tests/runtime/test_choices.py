"""Measured choices: which steps they are for, what they change, and that they survive the store."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from graphserve.artifacts import ArtifactStore
from graphserve.config import EngineConfig
from graphserve.kernels.cpu import CompiledSequence, compiler
from graphserve.plan.runner import StepSize
from graphserve.runtime import choices as choices_module
from graphserve.runtime import cpp_backend
from graphserve.runtime.choices import (
    DEFAULT,
    MeasuredChoices,
    StepChoice,
    choice_factors,
    load_choices,
    product_name,
    save_choices,
)
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.step_input import SamplingInput, StepInput
from graphserve.runtime.triton_plan import MAX_GEMV_ROWS, decode_segments, lower_to_triton
from tests.compiler.compiled import compiled_tiny
from tests.runtime.step_models import decode_step, table_runner
from tests.runtime.stub_step import StubStep
from tests.tiny_models import checkpoint_tensors, tiny_config, tiny_model

CPU = torch.device("cpu")


def decode(num_seqs: int) -> StepSize:
    return StepSize((num_seqs, num_seqs, num_seqs))


def step(num_seqs: int) -> StepInput:
    return decode_step([0] * num_seqs, SamplingInput(num_seqs))


def test_a_step_takes_the_choice_of_the_largest_measured_number_up_to_its_own() -> None:
    few, many = StepChoice(num_threads=1), StepChoice(num_threads=4)
    choices = MeasuredChoices({2: few, 16: many})
    assert [choices.of(decode(n)) for n in (1, 2, 3, 16, 31)] == [DEFAULT, few, few, many, many]
    assert choices.of(StepSize((20, 16, 16))) == DEFAULT, "a step with a prefill"


def test_a_step_far_larger_than_what_was_measured_runs_by_default() -> None:
    """A table of a warm-up for four sequences says nothing of 256."""
    choices = MeasuredChoices({4: StepChoice(vector_products=("8x64",)), 16: StepChoice(segments=4)})
    assert [choices.of(decode(n)) for n in (8, 15, 32, 256)] == [DEFAULT] * 4


def test_a_table_covers_an_engine_whose_largest_steps_it_knows() -> None:
    choices = MeasuredChoices({1: DEFAULT, 8: DEFAULT})
    assert [choices.covers(n) for n in (1, 8, 15, 16, 300)] == [True, True, True, False, False]
    assert MeasuredChoices({256: DEFAULT}).covers(1024) and not MeasuredChoices().covers(1)


def test_a_table_comes_back_from_the_store_for_the_same_device_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = MeasuredChoices({1: StepChoice(num_threads=3), 8: StepChoice(segments=4, vector_products=("8x64",))})
    store, plan = ArtifactStore(tmp_path), {"config": "abc"}
    save_choices(store, choice_factors(plan, EngineConfig(), CPU), choices, {"seconds": 1.0})
    assert load_choices(store, choice_factors(plan, EngineConfig(), CPU)) == choices
    assert load_choices(store, choice_factors({"config": "other"}, EngineConfig(), CPU)) is None
    assert load_choices(store, choice_factors(plan, EngineConfig(enforce_eager=True), CPU)) is None
    monkeypatch.setattr(choices_module, "usable_threads", lambda: 77)
    assert load_choices(store, choice_factors(plan, EngineConfig(), CPU)) is None
    assert list(store.verify())[0][1] is None


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_generated_kernels_run_on_the_chosen_threads_and_never_on_more_than_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, parameters = compiled_tiny("llama"), checkpoint_tensors(tiny_model(tiny_config("llama")))
    runner = ModelRunner(built.plan, parameters, built.constants, choices=MeasuredChoices({2: StepChoice(1)}))
    runner.allocate_kv_cache(8, 16)
    seen: list[int] = []
    run = CompiledSequence.run

    def watched(self, num_tokens, num_rows, num_sequences, num_threads, table_lens=()):
        seen.append(num_threads)
        run(self, num_tokens, num_rows, num_sequences, num_threads, table_lens)

    monkeypatch.setattr(CompiledSequence, "run", watched)
    monkeypatch.setattr(cpp_backend, "usable_threads", lambda: 2)
    logits = {}
    for num_seqs in (1, 2):
        logits[num_seqs] = runner.forward(step(num_seqs)).clone()
    assert set(seen) == {1, 2} and seen[-1] == 1
    runner.use_choices(MeasuredChoices({2: StepChoice(num_threads=64)}))
    seen.clear()
    torch.testing.assert_close(runner.forward(step(2)), logits[2])
    assert set(seen) == {2}
    runner.close()


@pytest.fixture(scope="module")
def lowered():
    built = compiled_tiny("llama")
    return lower_to_triton(built.plan, KVCache(built.plan, 2, 16, torch.device("meta")), "cuda:90")


def test_a_gpu_product_goes_to_the_kernel_that_the_choice_names(lowered) -> None:
    products = {name: x for x in lowered.plan.launches if (name := lowered.product_of(x)) is not None}
    assert len(products) > 2
    chosen, other = list(products)[:2]
    choice = StepChoice(vector_products=(chosen,))
    for num_rows in (1, 3):
        assert not lowered.is_library_product(products[chosen], num_rows, choice)
        assert lowered.is_library_product(products[other], num_rows, choice)
        assert lowered.is_library_product(products[chosen], num_rows) == (num_rows > MAX_GEMV_ROWS)
    fixed = msgspec.structs.replace(lowered, deterministic=True)
    assert not fixed.is_library_product(products[other], 3, choice), "a fixed order leaves nothing to the library"


def test_products_are_named_by_their_weight(lowered) -> None:
    head = next(x for x in reversed(lowered.plan.launches) if lowered.product_of(x) is not None)
    weight = lowered.plan.weights[head.args[1]["v"]]
    assert lowered.product_of(head) == product_name(weight.spec.shape) == "x".join(map(str, weight.spec.shape))


@pytest.mark.full
def test_a_gpu_step_launches_what_was_chosen() -> None:
    built = compiled_tiny("llama")
    num_seqs = 2
    by_default = StubStep(built, tiny_config("llama"))
    by_default.run(num_seqs)
    usual = [launch["kernel"] for launch in by_default.launches]
    segments = decode_segments(num_seqs * built.plan.cache_layers[0].kv_heads)
    products = {name for x in by_default.lowered.plan.launches if (name := by_default.lowered.product_of(x))}
    stub = StubStep(built, tiny_config("llama"))
    stub.backend.choices = MeasuredChoices({2: StepChoice(segments=1, vector_products=tuple(products))})
    stub.run(num_seqs)
    chosen = [launch["kernel"] for launch in stub.launches]
    assert segments != 1 and len([k for k in usual if "gemv" in str(k)]) == 0
    num_products = sum(x.op == "gs.linear.default" for x in built.plan.launches)
    assert len([k for k in chosen if "gemv" in str(k)]) == num_products
    decode_kernels = next(iter(stub.lowered.decode_kernels.values()))
    assert decode_kernels[1][0].symbol in chosen and decode_kernels[segments][0].symbol not in chosen


def test_recorded_steps_are_recorded_anew_with_other_choices() -> None:
    runner = table_runner(torch.randn(16, 16))
    runner.record([decode(1), decode(2)], ["greedy"])
    assert runner.num_graphs == 2
    runner.use_choices(MeasuredChoices({1: StepChoice(segments=4)}))
    assert runner.num_graphs == 0
    runner.record([decode(2)], ["greedy"])
    assert runner.num_graphs == 1
    runner.close()
