"""Virtual device memory against a stand-in for the driver that keeps the manual's rules."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch

from graphserve.errors import DeviceError
from graphserve.runtime.cuda_driver import CudaDriver
from graphserve.runtime.virtual_memory import VirtualArena, VirtualMemory, padded_bytes
from tests.runtime.stub_cuda import StubCuda, StubMemory

UNIT = StubMemory.GRANULARITY
CUDA = torch.device("cuda", 0)


def names(stub: StubCuda) -> list[str]:
    return [name for name, *_ in stub.calls if name.startswith("cuMem")]


def virtual_memory(free_units: int = 100, units: int = 5, chunk_units: int = 2) -> tuple[VirtualMemory, StubCuda]:
    stub = StubCuda({}, free_units * UNIT)
    return VirtualMemory(CudaDriver(stub), 0, units * UNIT - 7, chunk_units * UNIT), stub


def test_addresses_are_reserved_at_once_and_memory_when_it_is_mapped() -> None:
    memory, stub = virtual_memory()
    assert (memory.num_bytes, memory.is_mapped, stub.memory.free_bytes) == (5 * UNIT, False, 100 * UNIT)
    assert stub.memory.reserved == {memory.address: 5 * UNIT}
    memory.map()
    assert memory.is_mapped
    at = memory.address
    assert [(a, n) for a, (n, _) in stub.memory.mapped.items()] == [
        (at, 2 * UNIT), (at + 2 * UNIT, 2 * UNIT), (at + 4 * UNIT, UNIT)
    ]  # fmt: skip
    assert stub.memory.accessible == set(stub.memory.mapped)
    assert stub.memory.handles == {}, "a mapping keeps its memory without a handle"
    assert stub.memory.free_bytes == 95 * UNIT


def test_unmapped_memory_is_free_and_comes_back_at_the_same_addresses() -> None:
    memory, stub = virtual_memory()
    memory.map()
    mapped = {a: n for a, (n, _) in stub.memory.mapped.items()}
    for _ in range(3):
        memory.unmap()
        assert not stub.memory.mapped and not memory.is_mapped and stub.memory.free_bytes == 100 * UNIT
        assert stub.memory.reserved == {memory.address: 5 * UNIT}
        memory.map()
        assert {a: n for a, (n, _) in stub.memory.mapped.items()} == mapped


def test_out_of_memory_in_the_middle_leaves_nothing_mapped() -> None:
    memory, stub = virtual_memory(free_units=4)
    with pytest.raises(DeviceError, match=rf"{UNIT} of {5 * UNIT} bytes on device 0: CUDA_ERROR_OUT_OF_MEMORY"):
        memory.map()
    assert names(stub).count("cuMemMap") == 2
    assert (stub.memory.mapped, stub.memory.handles, stub.memory.free_bytes) == ({}, {}, 4 * UNIT)
    stub.memory.free_bytes = 5 * UNIT
    memory.map()
    assert stub.memory.free_bytes == 0


@pytest.mark.parametrize("function", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_refused_call_leaves_nothing_behind(function: str) -> None:
    memory, stub = virtual_memory()
    stub.fail[function] = 1
    with pytest.raises(DeviceError, match=f"{function} failed for .*CUDA_ERROR_INVALID_VALUE"):
        memory.map()
    assert (stub.memory.mapped, stub.memory.handles, stub.memory.free_bytes) == ({}, {}, 100 * UNIT)
    memory.close()
    assert not stub.memory.reserved


def test_closing_frees_memory_and_addresses() -> None:
    memory, stub = virtual_memory()
    memory.map()
    memory.close()
    assert (stub.memory.mapped, stub.memory.reserved, stub.memory.free_bytes) == ({}, {}, 100 * UNIT)
    last = [name for name, *_ in stub.calls[-6:]]
    assert last == ["cuCtxSetCurrent", "cuCtxSynchronize", *["cuMemUnmap"] * 3, "cuMemAddressFree"]


class HostMemory(VirtualArena):
    """An arena whose bytes are the host's. What was unmapped is lost, as on a device."""

    def unmap(self) -> None:
        super().unmap()
        self.bytes.fill_(0xEE)


def host_view(owner: Any) -> torch.Tensor:
    """Stands in for device memory: bytes of the host, kept with their owner as torch does."""
    (count,) = owner.__cuda_array_interface__["shape"]
    buffer = (ctypes.c_ubyte * count)()
    buffer.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(buffer, dtype=torch.uint8)


def arena(num_bytes: int, free_units: int = 10) -> tuple[VirtualArena, StubCuda]:
    stub = StubCuda({}, free_units * UNIT)
    return HostMemory(num_bytes, CUDA, CudaDriver(stub), host_view), stub


def test_tensors_of_an_arena_lie_apart_and_aligned() -> None:
    made, _ = arena(padded_bytes(20) + padded_bytes(24) + padded_bytes(0) + padded_bytes(2))
    a, b, empty, c = (
        made.allocate(*spec) for spec in (((5,), torch.float32), ((3, 4), torch.int16), ((0, 3), torch.int8),
                                          ((), torch.bfloat16))
    )  # fmt: skip
    assert [a.shape, b.shape, empty.shape, c.shape] == [(5,), (3, 4), (0, 3), ()]
    assert (b.data_ptr() - a.data_ptr(), c.data_ptr() - b.data_ptr()) == (256, 256)
    with pytest.raises(DeviceError, match="an arena of 768 bytes cannot hold 1024"):
        made.allocate((1,), torch.uint8)


def test_what_torch_gets_is_all_of_the_mapped_memory() -> None:
    seen: list[dict[str, Any]] = []
    stub = StubCuda({})
    made = VirtualArena(1000, CUDA, CudaDriver(stub), lambda o: seen.append(o.__cuda_array_interface__) or host_view(o))
    [address] = stub.memory.reserved
    assert seen == [{"shape": (1000,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3}]
    assert stub.memory.accessible == {address} and made.is_mapped


def test_memory_lives_as_long_as_a_tensor_in_it() -> None:
    made, stub = arena(1024)
    tensor = made.allocate((10,), torch.float32)
    del made
    gc.collect()
    assert stub.memory.mapped
    del tensor
    gc.collect()
    assert (stub.memory.mapped, stub.memory.reserved) == ({}, {})


def test_a_closed_arena_is_freed_once_although_tensors_are_left() -> None:
    made, stub = arena(1024)
    tensor = made.allocate((10,), torch.float32)
    made.close()
    made.close()
    assert (stub.memory.mapped, stub.memory.reserved, stub.memory.free_bytes) == ({}, {}, 10 * UNIT)
    del made, tensor
    gc.collect()
    assert names(stub).count("cuMemAddressFree") == 1


def test_an_arena_without_memory_leaves_no_addresses() -> None:
    stub = StubCuda({}, UNIT)
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        VirtualArena(3 * UNIT, CUDA, CudaDriver(stub), host_view)
    assert (stub.memory.reserved, stub.memory.free_bytes) == ({}, UNIT)
