"""Copies through pinned buffers on a device that is behind, and the weights that are read through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

BEHIND_CYCLES = 200_000_000  # a tenth of a second: the host fills both buffers long before the first is read


def test_every_byte_arrives_on_a_stream_that_is_behind(device: torch.device) -> None:
    import torch

    from graphserve.runtime.pinned_copies import PinnedCopies
    from tests.runtime.test_pinned_copies import BUFFER_BYTES, check_copies

    for stream in (torch.cuda.current_stream(device), torch.cuda.Stream(device)):
        with torch.cuda.stream(stream):
            copies = PinnedCopies(device, BUFFER_BYTES)
            assert all(buffer.is_pinned() for buffer, _ in copies._buffers) and len(copies._buffers) == 2
            torch.cuda._sleep(BEHIND_CYCLES)
            check_copies(device, copies)


def test_copy_waits_for_no_copy_and_the_end_for_all(device: torch.device) -> None:
    import torch

    from graphserve.runtime.pinned_copies import PinnedCopies

    with PinnedCopies(device, 1 << 20) as copies:
        copies.copy(torch.ones(5))  # torch's allocator has memory of that size from now on
        torch.cuda._sleep(BEHIND_CYCLES)
        is_through = torch.cuda.Event()
        is_through.record()
        copies.copy(torch.ones(5))
        assert not is_through.query()
    assert is_through.query()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_those_of_a_cpu(device: torch.device, dtype: str) -> None:
    import torch

    from graphserve.plan.schema import WeightPart
    from graphserve.runtime.pinned_copies import BUFFER_BYTES
    from graphserve.runtime.weights import materialize_weights
    from tests.runtime.test_weights import from_parameters, plan_with

    rows = BUFFER_BYTES // 64  # of 33 floats: more than two buffers
    plan = plan_with({
        "joined": from_parameters((rows + 5, 33), WeightPart("long", rows), WeightPart("short", 5), dtype=dtype),
        "transposed": from_parameters((33, 5), WeightPart("short", 33, is_transposed=True), dtype=dtype),
        "scale": from_parameters((33,), WeightPart("scale", 33), dtype=dtype),
    })  # fmt: skip
    parameters = [("long", torch.randn(rows, 33)), ("short", torch.randn(5, 33)), ("scale", torch.randn(33))]
    here, there = (materialize_weights(plan, parameters, {}, where) for where in (torch.device("cpu"), device))
    assert here.keys() == there.keys()
    for name, weight in here.items():
        assert there[name].device == device and torch.equal(there[name].cpu(), weight), name
