"""A real model that sleeps and wakes up on the CPU: memory goes, tokens stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from graphserve import LLM, SamplingParams
from graphserve.engine.model_executor import ModelExecutor
from graphserve.errors import ConfigError, RequestError
from graphserve.runtime.model_runner import ModelRunner
from tests.runtime.recorded_engine import recorded_steps

GREEDY = SamplingParams(temperature=0, max_tokens=12)
OPTIONS = {"max_model_len": 128, "num_gpu_blocks_override": 32, "max_num_seqs": 4}


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(["Once upon a time", "The little dog"], GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM("demo", **OPTIONS) as llm:
        yield llm


def runner_of(llm: LLM) -> ModelRunner:
    core = llm.llm_engine._core
    assert core is not None and isinstance(core._executor, ModelExecutor)
    runner = core._executor._runner
    assert isinstance(runner, ModelRunner)
    return runner


@pytest.mark.parametrize("level", [1, 2])
def test_tokens_are_equal_after_sleep(llm: LLM, level: int) -> None:
    before = tokens(llm)
    for _ in range(2):
        llm.sleep(level)
        assert llm.is_sleeping()
        llm.wake_up()
        assert not llm.is_sleeping()
        assert tokens(llm) == before


def test_a_sleeping_model_holds_no_pool_and_at_level_2_no_weights(llm: LLM) -> None:
    tokens(llm)
    runner = runner_of(llm)
    assert runner.kv_cache is not None
    pool = [weakref.ref(tensor) for layer in runner.kv_cache.layers for tensor in layer]
    constants = {name for name, weight in runner.plan.weights.items() if weight.source == "constant"}
    weights = [weakref.ref(tensor) for name, tensor in runner.weights.items() if name not in constants]
    if runner._cpp is not None:
        weights += [weakref.ref(tensor) for tensor in runner._cpp._packed.values()]
    llm.sleep(level=1)
    gc.collect()
    assert not any(ref() is not None for ref in pool) and all(ref() is not None for ref in weights)
    llm.wake_up()
    llm.sleep(level=2)
    gc.collect()
    assert not any(ref() is not None for ref in weights)
    with pytest.raises(ConfigError, match="forward of a sleeping model: call wake_up first"):
        runner.forward(None)  # type: ignore[arg-type]


def test_requests_are_refused_while_the_model_sleeps(llm: LLM) -> None:
    llm.sleep()
    with pytest.raises(RequestError, match=r"the engine sleeps: call wake_up\(\) before the request"):
        tokens(llm)
    llm.sleep()
    llm.wake_up()
    llm.wake_up()
    assert all(tokens(llm))


def test_a_model_with_requests_does_not_sleep(llm: LLM) -> None:
    llm.llm_engine.add_request("a", "Once", GREEDY)
    with pytest.raises(RequestError, match="1 requests have not ended: run them to their end or abort them"):
        llm.sleep()
    llm.llm_engine.abort("a")
    llm.sleep()


def test_an_unknown_level_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="level=3 is not allowed: 1 keeps the weights in host memory"):
        llm.sleep(level=3)
    assert not llm.is_sleeping()


def test_recorded_steps_without_virtual_memory_do_not_sleep() -> None:
    with recorded_steps(), LLM("demo", **OPTIONS) as llm:
        with pytest.raises(ConfigError, match="sleep needs a CUDA device: recorded steps hold the addresses"):
            llm.sleep()
        assert not llm.is_sleeping()
