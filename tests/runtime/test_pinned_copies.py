"""Copies through two buffers: every byte arrives, and no buffer is filled again before it was read.

``tests/gpu/test_pinned_copies.py`` runs :func:`check_copies` on a device, where copies take their time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphserve.runtime.pinned_copies import PinnedCopies

CPU = torch.device("cpu")
BUFFER_BYTES = 56  # no multiple of most of the sizes below


def host_tensors() -> list[torch.Tensor]:
    """Shapes and dtypes that differ in what may go wrong; the bytes of each are its own."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(64, 33, generator=generator)
    return [
        drawn,
        drawn.t(),
        drawn[::2, 1:],
        drawn.to(torch.bfloat16),
        drawn.to(torch.float8_e4m3fn),
        drawn > 0,
        drawn.to(torch.complex64),
        torch.tensor(7, dtype=torch.int64),
        torch.tensor(3.5)[None].expand(5),
        torch.empty(0, 3),
        *(torch.arange(n, dtype=torch.uint8) for n in (1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1)),
        torch.nn.Parameter(drawn + 1),
    ]


def check_copies(device: torch.device, copies: PinnedCopies) -> None:
    """Copy all, then look at all: the buffers are used again while earlier copies may be on their way.

    Raises:
        AssertionError: a copy differs from its source.
    """
    sources = host_tensors()
    with copies:
        made = [copies.copy(source) for source in sources]
    for copy, source in zip(made, sources, strict=True):
        assert (copy.shape, copy.dtype, copy.device) == (source.shape, source.dtype, device)
        assert copy.is_contiguous() and not copy.requires_grad
        here, there = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (source, copy))
        assert torch.equal(here, there), f"{source.dtype} {list(source.shape)}"


def test_every_byte_arrives() -> None:
    check_copies(CPU, PinnedCopies(CPU, BUFFER_BYTES))


class WatchedEvent:
    """The event of a buffer whose copy takes until it is waited for: the buffer must be as it was till then."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)
        self.leaving: torch.Tensor | None = None

    def record(self, stream: Any) -> None:
        assert self.leaving is None, "another copy out of a buffer that was not waited for"
        self.leaving = self.buffer.clone()

    def synchronize(self) -> None:
        assert self.leaving is None or torch.equal(self.leaving, self.buffer), "filled while a copy read it"
        self.leaving = None


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[PinnedCopies, list[WatchedEvent]]:
    monkeypatch.setattr(torch.cpu, "Event", WatchedEvent)
    copies = PinnedCopies(CPU, BUFFER_BYTES)
    for buffer, event in copies._buffers:
        event.buffer = buffer.zero_()
    return copies, [event for _, event in copies._buffers]


def test_a_buffer_is_filled_again_only_when_its_copy_is_through(
    watched: tuple[PinnedCopies, list[WatchedEvent]],
) -> None:
    check_copies(CPU, watched[0])


def test_both_buffers_are_on_their_way_at_a_time_and_the_end_waits_for_both(
    watched: tuple[PinnedCopies, list[WatchedEvent]],
) -> None:
    copies, events = watched
    with copies:
        for _ in range(3):
            copies.copy(torch.ones(BUFFER_BYTES + 1, dtype=torch.uint8))
            assert all(event.leaving is not None for event in events)
    assert all(event.leaving is None for event in events)


def test_without_memory_to_pin_torch_copies_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_empty = torch.empty

    def no_pinned(*size: Any, **options: Any) -> torch.Tensor:
        if "pin_memory" in options:
            raise RuntimeError("CUDA error: out of memory\nand advice in many lines")
        return real_empty(*size, **options)

    monkeypatch.setattr(torch, "empty", no_pinned)
    copies = PinnedCopies(CPU)
    monkeypatch.undo()
    (record,) = caplog.records
    assert "without pinned buffers, which is slower: CUDA error: out of memory" in record.getMessage()
    assert "advice" not in record.getMessage()
    source = torch.arange(6.0).reshape(2, 3)
    with copies:
        assert torch.equal(copies.copy(source), source)
