"""Whole steps on the device: captured graphs against eager launches, and both against the CPU, at bucket edges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from graphserve.runtime.device_runner import DeviceRunner

VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sample": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
    "logprobs": {"temperature": 0.8, "top_k": 20, "logprobs": 2},
    "bitmask": {"temperature": 0.8, "allowed_token_ids": list(range(3, 150, 2))},
    "split": {"temperature": 0.8, "logprobs": -1},
}


def generate(
    device: torch.device, count: int, options: dict[str, Any], captures: bool, overlap: bool = False
) -> tuple[Any, DeviceRunner]:
    """Tokens of ``count`` requests of a tiny llama in fp32 that begin together, and the runner of their steps."""
    import torch

    from graphserve.artifacts import open_store
    from graphserve.engine.device_executor import DeviceExecutor
    from graphserve.engine.engine_core import EngineCore
    from graphserve.engine.request import EngineCoreRequest
    from graphserve.engine.scheduler import SchedulerLimits
    from graphserve.runtime.cuda_graphs import CudaGraphs
    from graphserve.runtime.device_runner import DeviceRunner
    from graphserve.runtime.step_lowering import TritonLowering
    from graphserve.runtime.weights import materialize_weights
    from graphserve.sampling_params import SamplingParams
    from tests.compiler.compiled import compiled_tiny
    from tests.tiny_models import checkpoint_tensors, text_tokens, tiny_config, tiny_model

    built = compiled_tiny("llama")
    parameters = checkpoint_tensors(tiny_model(tiny_config("llama")))
    weights = materialize_weights(built.plan, parameters.items(), built.constants, device)
    on_gpu: dict[str, Any] = {}
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        on_gpu = {"stream": stream, "lowering": TritonLowering(device, stream, open_store(), overlap=overlap)}
    if captures:
        on_gpu |= {"graphs": lambda scalars: CudaGraphs(), "record_after": 0}
    runner = DeviceRunner(built.plan, weights, device, **on_gpu)
    core = EngineCore(DeviceExecutor(runner), SchedulerLimits(32, 128, 48, True), num_blocks=128, block_size=16)
    params = SamplingParams(max_tokens=12, **options)
    for index in range(count):
        prompt = [int(token) for token in text_tokens(3 + index % 5, seed=index)]
        core.add_request(EngineCoreRequest(str(index), prompt, params, 12, index, []))
    tokens: list[list[int]] = [[] for _ in range(count)]
    while core.has_unfinished_requests():
        for output in core.step():
            tokens[int(output.request_id)] += output.new_token_ids
    core.close()
    return tokens, runner


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 17])
def test_captured_steps_give_the_tokens_of_eager_ones(variant: str, count: int, device: torch.device) -> None:
    captured, runner = generate(device, count, VARIANTS[variant], captures=True)
    assert runner.num_eager_steps == 0
    assert runner.num_variant_steps[variant] == runner.num_variant_steps.total()
    eager, runner = generate(device, count, VARIANTS[variant], captures=False)
    assert runner.num_eager_steps == runner.num_variant_steps.total()
    assert captured == eager


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_overlapping_launches_give_the_same_tokens(variant: str, captures: bool, device: torch.device) -> None:
    import torch

    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    overlapping, _ = generate(device, 9, VARIANTS[variant], captures, overlap=True)
    assert overlapping == generate(device, 9, VARIANTS[variant], captures)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_steps_give_the_tokens_of_the_cpu(variant: str, device: torch.device) -> None:
    import torch

    captured, _ = generate(device, 8, VARIANTS[variant], captures=True)
    assert captured == generate(torch.device("cpu"), 8, VARIANTS[variant], captures=False)[0]
