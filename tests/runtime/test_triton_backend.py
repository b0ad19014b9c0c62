"""Triton kernels behind a plan, bound against a stand-in for the CUDA driver: no GPU is needed."""

import pytest
import torch

from graphserve.errors import DeviceError
from graphserve.kernels.triton.compile import compile_for
from graphserve.plan.runner import PlanRunner, StepSize
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.model_runner import _view_input
from graphserve.runtime.triton_backend import TritonBackend, target_of
from graphserve.runtime.triton_plan import lower_to_triton
from graphserve.runtime.weights import materialize_weights
from tests.compiler.compiled import compiled_tiny
from tests.runtime.stub_cuda import StubCuda
from tests.tiny_models import checkpoint_tensors, tiny_config, tiny_model

TARGET = "cuda:90"


@pytest.mark.parametrize(
    ("capability", "target"), [((8, 0), "cuda:80"), ((8, 9), "cuda:80"), ((9, 0), "cuda:90"), ((10, 3), "cuda:100")]
)
def test_a_device_gets_the_target_of_its_major_version(capability: tuple[int, int], target: str) -> None:
    assert target_of(capability) == target


def test_a_device_without_a_target_is_refused_by_name() -> None:
    with pytest.raises(DeviceError, match=r"7\.5 is not served: kernels exist for 8\.x, 9\.x, 10\.x"):
        target_of((7, 5))


@pytest.mark.full
def test_a_decode_step_is_exactly_the_plans_launches_with_the_plans_addresses() -> None:
    built = compiled_tiny("llama")
    parameters = checkpoint_tensors(tiny_model(tiny_config("llama")))
    cpu = torch.device("cpu")
    weights = materialize_weights(built.plan, parameters.items(), built.constants, cpu)
    cache = KVCache(built.plan, 8, 16, cpu)
    lowered = lower_to_triton(built.plan, cache, TARGET)
    compiled = {key: compile_for(kernel, TARGET) for key, kernel in lowered.distinct_kernels().items()}
    stub = StubCuda({c.name: c.binary for c in compiled.values()})
    backend = TritonBackend(lowered, compiled, CudaDriver(stub), cpu)
    backend.table_lens = [4]
    inputs = {
        "input_ids": torch.zeros(1, 4, dtype=torch.int64),
        "positions": torch.zeros(1, 4, dtype=torch.int64),
        "logits_indices": torch.zeros(4, dtype=torch.int64),
        "query_start_loc": torch.arange(5, dtype=torch.int32),
        "seq_lens": torch.ones(4, dtype=torch.int32),
        "slot_mapping.0": torch.zeros(4, dtype=torch.int64),
        "block_table.0": torch.zeros(4, 4, dtype=torch.int32),
    }
    for layer, (keys, values) in enumerate(cache.layers):
        inputs |= {f"kv_k.{layer}": keys, f"kv_v.{layer}": values}
    runner = PlanRunner(lowered.plan, weights, inputs, _view_input, cpu, {"triton": backend, "library": backend})
    assert not lowered.refusals, "a launch would run eagerly"
    runner.run(StepSize((4, 4, 4)))
    expected = sum(len(kernels) for kernels in lowered.kernels.values())
    assert len(stub.launches) == expected
    runner.run(StepSize((4, 4, 4)))
    first, second = stub.launches[:expected], stub.launches[expected:]
    assert first == second, "a bound step repeats itself to the address"
