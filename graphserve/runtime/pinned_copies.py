"""Tensors on their way from the host to a device, through two pinned buffers.

The driver copies memory that is not pinned through a buffer of its own, and the host waits until it is through. With
two buffers of ours the host fills one while the other is on the bus.
"""

from __future__ import annotations

import itertools
import logging
from types import TracebackType
from typing import Any

import torch

logger = logging.getLogger(__name__)

BUFFER_BYTES = 32 << 20  # of each: long enough that what a copy costs to begin does not count


class PinnedCopies:
    """Copies host tensors to a device, in order with the work of the current stream of the thread that asks.

    A context manager: its end waits for the copies that are still on their way. Without pinned memory, which is said
    in the log, every copy is one of torch's own. On a CPU the buffers are usual memory, which makes no sense but for
    tests.

    Args:
        device: where to.
        buffer_bytes: of each buffer; a longer tensor goes in parts.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._streams = torch.get_device_module(device)
        self._buffers: list[tuple[torch.Tensor, Any]] = []  # and an event after the last copy out of it
        try:
            for _ in range(2):
                buffer = torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
                self._buffers.append((buffer, self._streams.Event()))
        except RuntimeError as error:
            self._buffers.clear()
            reason = str(error).partition("\n")[0]
            logger.warning("weights are copied to %s without pinned buffers, which is slower: %s", device, reason)
        self._turns = itertools.cycle(self._buffers)

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor on the device with the values of ``source``, a host tensor of any shape and dtype.

        ``source`` may change as soon as this returns. The result may be used by work of the same stream only, unless
        that stream is waited for.
        """
        if not self._buffers:
            return source.detach().to(self._device).contiguous()
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        stream = self._streams.current_stream(self._device)
        parts, places = (_bytes(tensor).split(self._buffer_bytes) for tensor in (source, target))
        for part, place in zip(parts, places, strict=True):
            buffer, has_left = next(self._turns)
            has_left.synchronize()
            filled = buffer[: part.numel()].copy_(part)
            place.copy_(filled, non_blocking=True)
            has_left.record(stream)
        return target

    def __enter__(self) -> PinnedCopies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _, has_left in self._buffers:
            has_left.synchronize()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes in row-major order, uint8 [B]; a view if the tensor is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
