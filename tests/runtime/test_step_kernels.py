"""One prompt through the generated kernels of whole recorded steps, in Triton's interpreter, in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from graphserve.engine.device_executor import DeviceExecutor
from graphserve.engine.engine_core import EngineCore
from graphserve.engine.request import EngineCoreRequest
from graphserve.engine.scheduler import SchedulerLimits
from graphserve.kernels.triton.compile import interpret
from graphserve.kernels.triton.kernel import TritonKernel
from graphserve.plan.runner import Action, Binder, PlanRunner, StepSize
from graphserve.plan.schema import Launch, Plan
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.launch_specs import tensor_names
from graphserve.runtime.recorder import Recorder
from graphserve.runtime.step_lowering import lower_variants
from graphserve.runtime.step_programs import References
from graphserve.runtime.weights import materialize_weights
from graphserve.sampling_params import SamplingParams
from tests.compiler.compiled import compiled
from tests.runtime.step_models import CPU
from tests.tiny_models import checkpoint_tensors, text_tokens, tiny_config, tiny_model

# The interpreter casts without checking; a NaN that a mask drops later is cast like any other value.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


Model = tuple[Plan, dict[str, torch.Tensor]]


class Interpreter(References):
    """Binds launches to their kernels in Triton's interpreter; a lowering and its own binder."""

    def __init__(self) -> None:
        self.kernels: dict[str, list[TritonKernel]] = {}
        self.num_launches = 0

    def lower(self, plans: Sequence[Plan], kv_cache: KVCache, table_len: int) -> list[tuple[Plan, dict[str, Binder]]]:
        lowered, together = lower_variants(plans, kv_cache, "cuda:90")
        assert not any(plan.refusals for plan in lowered)
        self.kernels = {kernels[0].symbol: kernels for kernels in together.kernels.values()}
        self._table_lens = {f"B_{group}": table_len for group in range(len(plans[0].cache_groups))}
        return [(plan.plan, {"triton": self}) for plan in lowered]

    def bind(self, launch: Launch, runner: PlanRunner, tensors: Mapping[str, Any], size: StepSize) -> Action:
        assert launch.kernel is not None
        kernels = self.kernels[launch.kernel]
        values = [tensors[name] if name else None for name in tensor_names(launch)]
        scalars = {"T": size.num_tokens, "R": size.num_rows, "S": size.num_seqs, **self._table_lens}

        def action() -> None:
            self.num_launches += 1
            interpret(kernels, values, scalars)

        return action

    def finish(self, actions: list[Action], size: StepSize) -> list[Action]:
        return actions


@pytest.fixture(scope="module")
def tiny_llama() -> Model:
    config = tiny_config("llama")
    config.num_hidden_layers = 1
    built = compiled(config)
    parameters = checkpoint_tensors(tiny_model(config))
    return built.plan, materialize_weights(built.plan, parameters.items(), built.constants, CPU)


def generate(model: Model, lowering: Any, count: int, params: SamplingParams) -> tuple[list[list[int]], DeviceRunner]:
    """Tokens of ``count`` requests that run together, every step of them recorded."""
    plan, weights = model

    def kernels_of(launch: Launch) -> list[TritonKernel]:
        return lowering.kernels[launch.kernel] if launch.kind == "triton" else []

    runner = DeviceRunner(
        plan,
        dict(weights),
        CPU,
        lowering=lowering,
        graphs=lambda scalars: Recorder(scalars, kernels_of),
        record_after=0,
    )
    limits = SchedulerLimits(16, 64, 16, True)
    core = EngineCore(DeviceExecutor(runner), limits, num_blocks=32, block_size=16)
    for index in range(count):
        prompt = text_tokens(3, seed=index)
        core.add_request(EngineCoreRequest(str(index), list(map(int, prompt)), params, params.max_tokens, index, []))
    tokens: list[list[int]] = [[] for _ in range(count)]
    while core.has_unfinished_requests():
        for output in core.step():
            tokens[int(output.request_id)] += output.new_token_ids
    assert runner.num_eager_steps == 0
    return tokens, runner


def check(model: Model, count: int, params: SamplingParams, variant: str) -> None:
    """The kernels give the references' tokens, and every launch of each step was a kernel."""
    interpreter = Interpreter()
    tokens, runner = generate(model, interpreter, count, params)
    assert tokens == generate(model, References(), count, params)[0]
    assert all(len(ids) == params.max_tokens for ids in tokens)
    assert runner.num_variant_steps[variant] == runner.num_variant_steps.total()
    assert interpreter.num_launches > 10 * runner.num_variant_steps.total()


@pytest.mark.parametrize("count", [*(pytest.param(n, marks=pytest.mark.full) for n in (1, 2)), 3])
def test_greedy_tokens_at_the_edges_of_a_bucket(tiny_llama: Model, count: int) -> None:
    check(tiny_llama, count, SamplingParams(temperature=0, max_tokens=3), "greedy")


OPTIONS: dict[str, dict[str, Any]] = {
    "sample": {"top_p": 0.9, "logit_bias": {5: 1.0}},
    "logprobs": {"top_k": 20, "logprobs": 2},
    "bitmask": {"allowed_token_ids": list(range(3, 150, 2)), "min_p": 0.01},
}


@pytest.mark.parametrize(
    "variant", ["logprobs", *(pytest.param(v, marks=pytest.mark.full) for v in ("sample", "bitmask"))]
)
def test_sampled_tokens(tiny_llama: Model, variant: str) -> None:
    check(tiny_llama, 2, SamplingParams(temperature=0.8, max_tokens=3, **OPTIONS[variant]), variant)


@pytest.mark.full
@pytest.mark.parametrize("count", [7, 8, 9])
def test_greedy_tokens_at_the_edges_of_a_larger_bucket(tiny_llama: Model, count: int) -> None:
    check(tiny_llama, count, SamplingParams(temperature=0, max_tokens=4), "greedy")
