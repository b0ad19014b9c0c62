"""Engines of a tiny Llama in fp32 whose steps run on a device, captured or launch by launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphserve.artifacts import open_store
from graphserve.engine.device_executor import DeviceExecutor
from graphserve.engine.engine_core import EngineCore
from graphserve.engine.request import EngineCoreRequest
from graphserve.engine.scheduler import SchedulerLimits
from graphserve.runtime.cuda_graphs import CudaGraphs
from graphserve.runtime.device_runner import DeviceRunner
from graphserve.runtime.recorder import Recorder
from graphserve.runtime.step_lowering import TritonLowering
from graphserve.runtime.weights import materialize_weights
from graphserve.sampling_params import SamplingParams
from tests.compiler.compiled import compiled_tiny
from tests.tiny_models import checkpoint_tensors, text_tokens, tiny_config, tiny_model

# What makes a step take each of its variants.
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sample": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
    "logprobs": {"temperature": 0.8, "top_k": 20, "logprobs": 2},
    "bitmask": {"temperature": 0.8, "allowed_token_ids": list(range(3, 150, 2))},
    "split": {"temperature": 0.8, "logprobs": -1},
}


def tiny_engine(
    device: torch.device,
    limits: SchedulerLimits,
    captures: bool,
    overlap: bool = False,
    max_model_len: int = 128,
    num_blocks: int = 128,
) -> tuple[EngineCore, DeviceRunner]:
    """An engine, and the runner of its steps. On a CPU the launches are references, and the recorder captures."""
    built = compiled_tiny("llama", max_model_len=max_model_len)
    parameters = checkpoint_tensors(tiny_model(tiny_config("llama")))
    weights = materialize_weights(built.plan, parameters.items(), built.constants, device)
    options: dict[str, Any] = {}
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        options = {"stream": stream, "lowering": TritonLowering(device, stream, open_store(), overlap=overlap)}
    if captures:
        graphs = Recorder if device.type == "cpu" else lambda scalars: CudaGraphs()
        options |= {"graphs": graphs, "record_after": 0}
    runner = DeviceRunner(built.plan, weights, device, **options)
    return EngineCore(DeviceExecutor(runner), limits, num_blocks, block_size=16), runner


def run_requests(core: EngineCore, max_tokens: Sequence[int], options: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Output tokens of requests with short prompts that begin together; each has a length and sampling options."""
    for index, (most, given) in enumerate(zip(max_tokens, options, strict=True)):
        prompt = [int(token) for token in text_tokens(3 + index % 5, seed=index)]
        params = SamplingParams(max_tokens=most, **given)
        core.add_request(EngineCoreRequest(str(index), prompt, params, most, index, []))
    tokens: list[list[int]] = [[] for _ in max_tokens]
    while core.has_unfinished_requests():
        for output in core.step():
            assert output.error is None, output.error
            tokens[int(output.request_id)] += output.new_token_ids
    return tokens
