"""Weights and KV pool that sleep: in virtual memory whose driver and bytes are stand-ins, and as plain CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphserve.errors import ConfigError, DeviceError
from graphserve.plan.schema import CacheGroup, CacheSpec, Launch, Plan, TensorSpec, WeightPart, WeightSpec
from graphserve.runtime import kv_cache, weight_memory
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.weight_memory import WeightMemory
from tests.runtime.stub_cuda import StubCuda, StubMemory
from tests.runtime.test_virtual_memory import CUDA, HostMemory, host_view

CPU = torch.device("cpu")
GROUPS = [CacheGroup((0, 1))]
CACHE = [CacheSpec(kv_heads=2, k_dim=8, v_dim=8, dtype="float32")] * 2


def plan() -> Plan:
    """A weight made of two parameters, a constant, one made by init, and one that init alone reads."""
    weights = {
        "joined": WeightSpec(TensorSpec((5, 3), "float32"), "parameter", (WeightPart("a", 2), WeightPart("b", 3))),
        "scale": WeightSpec(TensorSpec((), "float32"), "constant"),
        "table": WeightSpec(TensorSpec((3,), "float32"), "init"),
        "raw": WeightSpec(TensorSpec((3,), "float32"), "parameter", (WeightPart("c", 3),)),
    }
    reads = tuple({"v": name} for name in ("joined", "scale", "table"))
    return Plan(
        model={"max_model_len": 4}, buffers={}, weights=weights, cache_layers=CACHE, cache_groups=GROUPS, outputs=(),
        init=[Launch("aten.neg.default", ({"v": "raw"},), {}, ("table",))],
        launches=[Launch("gs.test.default", reads, {}, ())], passes=[],
    )  # fmt: skip


class Checkpoint:
    def __init__(self) -> None:
        self.num_reads = 0

    def __call__(self) -> Any:
        self.num_reads += 1
        values = {"a": torch.ones(2, 3), "b": torch.full((3, 3), 2.0), "c": torch.tensor([1.0, 2.0, 3.0])}
        return iter(values.items())


CONSTANTS = {"scale": torch.tensor(0.5)}
EXPECTED = {
    "joined": torch.cat([torch.ones(2, 3), torch.full((3, 3), 2.0)]),
    "scale": torch.tensor(0.5),
    "table": torch.tensor([-1.0, -2.0, -3.0]),
}


def check(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == EXPECTED.keys()
    for name, value in EXPECTED.items():
        assert torch.equal(tensors[name], value), name


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubCuda:
    """A device on which weights and KV pool lie in virtual memory."""
    stub = StubCuda({}, 8 * StubMemory.GRANULARITY)

    def arena_on(device: torch.device, num_bytes: int) -> HostMemory:
        return HostMemory(num_bytes, CUDA, CudaDriver(stub), host_view)

    monkeypatch.setattr(weight_memory, "arena_on", arena_on)
    monkeypatch.setattr(kv_cache, "arena_on", arena_on)
    return stub


@pytest.mark.parametrize("level", [1, 2])
def test_virtual_weights_come_back_where_they_were(stub: StubCuda, level: int) -> None:
    checkpoint = Checkpoint()
    memory = WeightMemory(plan(), checkpoint, CONSTANTS, CPU)
    check(memory.tensors)
    held = dict(memory.tensors)
    addresses = {name: tensor.data_ptr() for name, tensor in held.items()}
    for _ in range(2):
        memory.sleep(level)
        assert not stub.memory.mapped and stub.memory.free_bytes == 8 * StubMemory.GRANULARITY
        assert not torch.equal(held["joined"], EXPECTED["joined"])
        memory.wake_up()
        check(held)
        assert {name: tensor.data_ptr() for name, tensor in memory.tensors.items()} == addresses
    assert checkpoint.num_reads == (1 if level == 1 else 3)


def test_weights_that_find_no_memory_sleep_on_and_can_be_woken_later(stub: StubCuda) -> None:
    memory = WeightMemory(plan(), Checkpoint(), CONSTANTS, CPU)
    memory.sleep(1)
    stub.memory.free_bytes = 0
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        memory.wake_up()
    stub.memory.free_bytes = StubMemory.GRANULARITY
    memory.wake_up()
    check(memory.tensors)


def test_closing_gives_the_memory_back_whoever_holds_tensors(stub: StubCuda) -> None:
    memory = WeightMemory(plan(), Checkpoint(), CONSTANTS, CPU)
    held = dict(memory.tensors)
    memory.close()
    assert held and not stub.memory.mapped and not stub.memory.reserved


def test_a_virtual_pool_comes_back_empty_where_it_was(stub: StubCuda) -> None:
    cache = KVCache(plan(), num_blocks=3, block_size=4, device=CPU)
    keys, values = cache.layers[1]
    assert not keys.any() and not values.any()
    keys.fill_(7.0)
    address = keys.data_ptr()
    cache.unmap()
    assert not stub.memory.mapped
    cache.map()
    assert cache.layers[1][0].data_ptr() == address
    assert not keys.any() and not values.any()


def test_cpu_weights_are_read_again_after_level_2_and_stay_at_level_1() -> None:
    checkpoint = Checkpoint()
    memory = WeightMemory(plan(), checkpoint, CONSTANTS, CPU)
    tensors = memory.tensors
    memory.sleep(1)
    check(tensors)
    memory.wake_up()
    memory.sleep(2)
    assert not tensors
    memory.wake_up()
    check(tensors)
    assert checkpoint.num_reads == 2


def test_parameters_that_were_read_once_rule_out_level_2() -> None:
    memory = WeightMemory(plan(), Checkpoint()(), CONSTANTS, CPU)
    with pytest.raises(ConfigError, match=r"sleep\(level=2\) needs parameters that can be read again: use level=1"):
        memory.sleep(2)
    check(memory.tensors)
