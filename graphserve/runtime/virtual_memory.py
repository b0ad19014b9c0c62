"""Device memory at addresses that stay: reserved once, backed by memory only while it is needed.

The addresses of weights and KV pool are in captured graphs and in prepared launches. They must not move when their
memory is given back and taken again, which the driver's virtual memory functions allow.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphserve.errors import DeviceError
from graphserve.runtime.cuda_driver import CudaDriver, MemoryAccess, MemoryLocation, MemoryProperties

ALIGNMENT = 256  # bytes, of every tensor
_CHUNK_BYTES = 1 << 30  # memory that is asked for at a time


class VirtualMemory:
    """A range of device addresses.

    Unmapping and closing wait for all work of the device, which may be using the memory.

    Args:
        driver: the CUDA driver; its device's primary context is made current on this thread.
        device: index of the device.
        num_bytes: at least so many addresses are reserved; the driver's granularity rounds up.
        chunk_bytes: memory that is asked for at a time, rounded up likewise.

    Attributes:
        address: of the first byte.
        num_bytes: reserved, and mapped by :meth:`map`.

    Raises:
        DeviceError: the driver refuses to reserve the addresses.
    """

    def __init__(self, driver: CudaDriver, device: int, num_bytes: int, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self._driver = driver
        self._device = device
        driver.use_device(device)
        location = MemoryLocation(MemoryLocation.DEVICE, device)
        self._properties = MemoryProperties(type=MemoryProperties.PINNED, location=location)
        self._access = MemoryAccess(location, MemoryAccess.READ_WRITE)
        granularity = ctypes.c_size_t()
        driver.call(
            "cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self._properties), 0,
            what=f"device {device}",
        )  # fmt: skip
        unit = granularity.value
        self.num_bytes = max(1, -(-num_bytes // unit)) * unit
        chunk_bytes = -(-chunk_bytes // unit) * unit
        self._chunks = [(at, min(chunk_bytes, self.num_bytes - at)) for at in range(0, self.num_bytes, chunk_bytes)]
        self._mapped: list[tuple[int, int]] = []
        address = ctypes.c_uint64()
        what = f"{self.num_bytes} bytes of addresses"
        driver.call("cuMemAddressReserve", ctypes.byref(address), self.num_bytes, 0, 0, 0, what=what)
        self.address = address.value

    @property
    def is_mapped(self) -> bool:
        return bool(self._mapped)

    def map(self) -> None:
        """Put memory behind all addresses. What it holds is unknown.

        Raises:
            DeviceError: the device has not that much free memory; nothing stays mapped then.
        """
        assert not self._mapped, "mapped already"
        try:
            for offset, size in self._chunks:
                self._map_chunk(self.address + offset, size)
        except DeviceError:
            self._unmap()
            raise

    def _map_chunk(self, address: int, size: int) -> None:
        driver, handle = self._driver, ctypes.c_uint64()
        what = f"{size} of {self.num_bytes} bytes on device {self._device}"
        driver.call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), 0, what=what)
        try:
            driver.call("cuMemMap", address, size, 0, handle, 0, what=what)
        finally:
            # A mapping keeps its memory: with the handle gone, unmapping is all that it takes to free it.
            driver.call("cuMemRelease", handle, what=what)
        self._mapped.append((address, size))
        driver.call("cuMemSetAccess", address, size, ctypes.byref(self._access), 1, what=what)

    def unmap(self) -> None:
        """Give the memory back and keep the addresses."""
        self.synchronize()
        self._unmap()

    def synchronize(self) -> None:
        """Wait for the device."""
        self._driver.use_device(self._device)  # a garbage collector may call from any thread
        self._driver.call("cuCtxSynchronize")

    def _unmap(self) -> None:
        while self._mapped:
            address, size = self._mapped.pop()
            self._driver.call("cuMemUnmap", address, size, what=f"{size} bytes on device {self._device}")

    def close(self) -> None:
        """Give memory and addresses back. The last call."""
        self.unmap()
        self._driver.call("cuMemAddressFree", self.address, self.num_bytes)


class VirtualArena:
    """Tensors in virtual memory, one behind the other; mapped when it is made.

    Its memory is freed when the arena and all tensors in it are gone, or by :meth:`close`.

    Args:
        num_bytes: the sum of :func:`padded_bytes` of the tensors that will be made.
        device: a CUDA device.
        driver: the system's by default.
        view: makes an uint8 tensor of an object with ``__cuda_array_interface__``, by default ``torch.as_tensor``,
            which keeps the object alive with the tensor and copies nothing.

    Attributes:
        bytes: all of it, uint8.

    Raises:
        DeviceError: the device has not that much free memory.
    """

    def __init__(
        self,
        num_bytes: int,
        device: torch.device,
        driver: CudaDriver | None = None,
        view: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        index = device.index or 0
        self._memory = memory = VirtualMemory(driver or CudaDriver(), index, num_bytes)
        try:
            self.map()
        except DeviceError:
            memory.close()
            raise
        self._owner = _Bytes(memory, num_bytes)
        self._view = view or (lambda owner: torch.as_tensor(owner, device=torch.device("cuda", index)))
        self.bytes = self._view(self._owner)
        self._used = 0

    @property
    def is_mapped(self) -> bool:
        return self._memory.is_mapped

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor; its values are unknown."""
        count = dtype.itemsize
        for dim in shape:
            count *= dim
        start, self._used = self._used, self._used + padded_bytes(count)
        if self._used > self.bytes.numel():
            raise DeviceError(f"an arena of {self.bytes.numel()} bytes cannot hold {self._used}")
        return self.bytes[start : start + count].view(dtype).view(tuple(shape))

    def unmap(self) -> None:
        """Give the memory back; the tensors stay, and must not be used until :meth:`map`."""
        self._memory.unmap()

    def map(self) -> None:
        """Take memory again, at the same addresses. What the tensors hold is unknown.

        Raises:
            DeviceError: the device has not that much free memory; the arena stays unmapped then.
        """
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what torch keeps for later is not free to the driver
        self._memory.map()

    def synchronize(self) -> None:
        """Wait for the device."""
        self._memory.synchronize()

    def close(self) -> None:
        """Free it although tensors may be left, which must not be used any more."""
        self._owner.close()


class _Bytes:
    """Mapped memory as torch takes it from outside. It is freed with the last tensor that refers to it."""

    def __init__(self, memory: VirtualMemory, num_bytes: int) -> None:
        # Empty memory has no address in this protocol, so one byte is the least.
        size = max(1, num_bytes)
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (memory.address, False), "strides": None, "version": 3,
        }  # fmt: skip
        self.close = weakref.finalize(self, memory.close)
        self.close.atexit = False  # the driver may be gone by then, and takes all memory with it


def arena_on(device: torch.device, num_bytes: int) -> VirtualArena | None:
    """An arena where memory has to keep its addresses, None on other devices."""
    return VirtualArena(num_bytes, device) if device.type == "cuda" else None


def padded_bytes(num_bytes: int) -> int:
    """Bytes of an arena that a tensor takes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
