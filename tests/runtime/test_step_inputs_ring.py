"""Packed step inputs: what is written comes out at fixed places, and only as much is copied as a step needs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphserve.plan.runner import StepSize
from graphserve.runtime.step_input import LogitsAdjustment, SamplingInput
from graphserve.runtime.step_inputs_ring import NO_LIMIT, StepInputsRing
from graphserve.runtime.step_plan import StepLimits
from tests.runtime.step_models import CPU, LANES, decode_step, table_plan

VOCAB = 70
LARGEST = StepSize((16, 16, 16))
LIMITS = StepLimits(num_lanes=LANES, max_rows=16, num_slots=2, max_stop_ids=2, max_list_ids=32)


def make_ring() -> StepInputsRing:
    return StepInputsRing(table_plan(VOCAB), LIMITS, 4, LARGEST, CPU)


def read(ring: StepInputsRing, name: str, rows: int) -> list:
    tensor = ring.names[name]
    return ring.view(name, tensor, StepSize((rows, rows, rows))).tolist()


def test_every_field_is_what_was_written() -> None:
    ring = make_ring()
    step = decode_step([5, -1, 7], SamplingInput(3), lanes=[4, 2, 0], num_rows=4)
    step.positions[:3] = [9, 3, 1]
    step.block_tables[0] = np.array([[1, 2], [3, 0], [4, 0], [0, 0]], np.int32)
    ring.write(step, "greedy", 1)
    assert read(ring, "step.host_ids", 4) == [[5, -1, 7, 0]]
    assert read(ring, "positions", 4) == [[9, 3, 1, 0]]
    assert read(ring, "step.token_lanes", 4) == [LANES, 2, LANES, LANES]
    assert read(ring, "step.row_lanes", 4) == [4, 2, 0, LANES]
    assert read(ring, "step.host_slots", 4) == [step.slot_mappings[0].tolist()]
    assert read(ring, "query_start_loc", 4) == [0, 1, 2, 3, 3]
    assert read(ring, "seq_lens", 4) == [1, 1, 1, 0]
    assert read(ring, "step.ring_slot", 4) == [1]
    assert [row[:2] for row in read(ring, "block_table.0", 4)] == [[1, 2], [3, 0], [4, 0], [0, 0]]
    assert read(ring, "step.stop_ids", 4) == [[-1, -1]] * 4 and read(ring, "step.tokens_left", 4) == [NO_LIMIT] * 4


def test_places_depend_on_the_size_alone() -> None:
    ring = make_ring()
    places = []
    for slot, ids in enumerate(([1, 2], [3, 4])):
        ring.write(decode_step(ids, SamplingInput(2)), "sample", slot)
        view = ring.view("step.host_ids", ring.names["step.host_ids"], StepSize((2, 2, 2)))
        places.append(view.data_ptr())
        assert view.tolist() == [ids]
    assert places[0] == places[1]
    assert all(place % 64 == 0 for place in places)


def test_rows_behind_the_sampled_ones_are_greedy_and_unlimited() -> None:
    ring = make_ring()
    full = SamplingInput(
        2, is_greedy=False, temperature=np.array([0.5, 2], np.float32), top_k=np.array([3, 0]),
        top_p=np.array([0.25, 1], np.float32), min_p=np.array([0, 0.5], np.float32),
        keys=np.array([[1, 2], [3, 2**32 - 1]], np.uint32),
        adjustments=[LogitsAdjustment(1, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=-1.0)],
        stop_ids=np.array([[8, -1, -1], [7, 6, 5]], np.int32), tokens_left=np.array([3, 1], np.int32),
    )  # fmt: skip
    for _ in range(2):  # what an earlier step left behind does not show
        ring.write(decode_step([1, 2, 3, 4], SamplingInput(4, stop_ids=np.full((4, 2), 9, np.int32))), "sample", 0)
        ring.write(decode_step([1, 2], full, num_rows=4), "sample", 0)
        assert read(ring, "step.temperature", 4) == [0.5, 2, 0, 0] and read(ring, "step.top_k", 4) == [3, 0, 0, 0]
        assert read(ring, "step.top_p", 4) == [0.25, 1, 1, 1]
        assert read(ring, "step.log_min_p", 4) == [-np.inf, pytest.approx(np.log(0.5)), -np.inf, -np.inf]
        assert read(ring, "step.keys", 4)[:2] == [[1, 2], [3, -1]]
        assert read(ring, "step.repetition_penalty", 4) == [1, 2, 1, 1]
        assert read(ring, "step.frequency_penalty", 4) == [0, 0.5, 0, 0]
        assert read(ring, "step.presence_penalty", 4) == [0, -1, 0, 0]
        assert read(ring, "step.stop_ids", 4) == [[8, -1], [7, 6], [-1, -1], [-1, -1]]
        assert read(ring, "step.tokens_left", 4) == [3, 1, NO_LIMIT, NO_LIMIT]


def test_lists_lie_behind_one_another_and_the_mask_holds_the_allowed_tokens() -> None:
    ring = make_ring()
    sampling = SamplingInput(3, adjustments=[
        LogitsAdjustment(0, banned_ids=np.array([3, 1])),
        LogitsAdjustment(2, banned_ids=np.array([5]), bias_ids=np.array([6]), bias_values=np.array([0.5], np.float32)),
    ])  # fmt: skip
    ring.write(decode_step([1, 2, 3], sampling), "sample", 0)
    assert read(ring, "step.banned_starts", 3) == [0, 2, 2, 3] and read(ring, "step.banned_ids", 3)[:3] == [3, 1, 5]
    assert read(ring, "step.bias_starts", 3) == [0, 0, 0, 1] and read(ring, "step.bias_values", 3)[0] == 0.5
    assert read(ring, "step.seen_starts", 3) == [0, 0, 0, 0]
    sampling.adjustments = [LogitsAdjustment(1, allowed_ids=np.array([0, 31, 32, 69]))]
    ring.write(decode_step([1, 2, 3], sampling), "bitmask", 0)
    assert read(ring, "step.bitmask", 3) == [[-1, -1, -1], [1 - 2**31, 1, 1 << 5], [-1, -1, -1]]
    assert read(ring, "step.banned_starts", 3) == [0, 0, 0, 0]


def test_a_list_that_is_too_long_is_refused() -> None:
    sampling = SamplingInput(1, adjustments=[LogitsAdjustment(0, banned_ids=np.arange(33))])
    with pytest.raises(ValueError, match="33 banned ids in one step: the device takes 32"):
        make_ring().write(decode_step([1], sampling), "sample", 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 16), st.integers(0, 1), st.integers(0, 99)), min_size=1, max_size=6))
def test_steps_of_any_sizes_follow_one_another(steps: list[tuple[int, int, int]]) -> None:
    ring = make_ring()
    for rows, slot, first in steps:
        ids = [(first + i) % VOCAB for i in range(rows)]
        ring.write(decode_step(ids, SamplingInput(rows)), "sample" if first % 2 else "greedy", slot)
        assert read(ring, "step.host_ids", rows) == [ids]
        assert read(ring, "query_start_loc", rows) == list(range(rows + 1))
        if first % 2:
            assert read(ring, "step.temperature", rows) == [0.0] * rows


def test_no_two_fields_of_a_size_share_bytes() -> None:
    ring = make_ring()
    size = StepSize((3, 5, 2))
    spans = []
    for name, tensor in ring.names.items():
        view = ring.view(name, tensor, size)
        if view.untyped_storage().data_ptr() == ring.names["step.host_ids"].untyped_storage().data_ptr():
            spans.append((view.data_ptr(), view.data_ptr() + view.numel() * view.element_size()))
    spans.sort()
    assert len(spans) > 20 and all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    assert isinstance(ring.num_bytes, int) and ring.num_bytes > spans[-1][1] - spans[0][0]


def test_positions_of_the_device_are_fresh_for_each_variant() -> None:
    """A greedy step copies less; the step behind it still sees its own parameters."""
    ring = make_ring()
    hot = SamplingInput(
        1, is_greedy=False, temperature=np.ones(1, np.float32), top_k=np.zeros(1, np.int64),
        top_p=np.ones(1, np.float32), min_p=np.zeros(1, np.float32), keys=np.zeros((1, 2), np.uint32),
    )  # fmt: skip
    ring.write(decode_step([1], hot), "sample", 0)
    ring.write(decode_step([2], SamplingInput(1)), "greedy", 1)
    ring.write(decode_step([3], SamplingInput(1)), "sample", 0)
    assert read(ring, "step.temperature", 1) == [0.0] and read(ring, "step.host_ids", 1) == [[3]]
