"""Measuring choices: on a device whose step times are known, the best choice is found and noise is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import msgspec
import pytest
import torch

from graphserve.engine import measure_choices
from graphserve.engine.measure_choices import MAX_PROGRAMS, MAX_VECTOR_SEQS, best_choice, decode_step, moves
from graphserve.runtime.choices import DEFAULT, MeasuredChoices, StepChoice, product_name
from graphserve.runtime.step_input import StepInput, StepOutput
from graphserve.runtime.triton_plan import DECODE_SEGMENTS
from tests.compiler.compiled import compiled_tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class TimedExecutor:
    """Steps take the seconds that ``cost`` gives for the choice in use; the first one after a change takes long."""

    def __init__(self, cost: Callable[[StepChoice], float], max_in_flight: int) -> None:
        self.max_in_flight = max_in_flight
        self.choices = MeasuredChoices()
        self.now = 0.0
        self.in_flight = 0
        self._cost = cost
        self._is_new = True

    def use_choices(self, choices: MeasuredChoices) -> None:
        assert self.in_flight == 0
        self.choices, self._is_new = choices, True

    def submit(self, step: StepInput) -> TimedExecutor:
        self.in_flight += 1
        assert self.in_flight <= self.max_in_flight
        (choice,) = {*self.choices.decode.values()} or {DEFAULT}
        self.now += self._cost(choice) + (10.0 if self._is_new else 0.0)
        self._is_new = False
        return self

    def result(self) -> StepOutput:
        self.in_flight -= 1
        return StepOutput([0])


def find(cost: Callable[[StepChoice], float], alternatives, max_in_flight: int = 2) -> StepChoice:
    executor = TimedExecutor(cost, max_in_flight)
    found = best_choice(executor, decode_step(4, 64, 9, 16, 1), alternatives, clock=lambda: executor.now)
    assert executor.choices == MeasuredChoices(), "the executor is left with its defaults"
    return found


def threads(*counts: int):
    return [partial(msgspec.structs.replace, num_threads=count) for count in counts]


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_the_fastest_of_several_is_found(max_in_flight: int) -> None:
    cost = {None: 1.0, 1: 2.0, 2: 0.9, 4: 0.8, 8: 0.95}
    found = find(lambda choice: cost[choice.num_threads], threads(1, 2, 4, 8), max_in_flight)
    assert found == StepChoice(num_threads=4)


def test_what_is_as_fast_but_for_noise_stays_by_default() -> None:
    rng = random.Random(0)
    found = [find(lambda choice: 1 + rng.gauss(0, 0.002), threads(1, 2, 4)) for _ in range(20)]
    assert found == [DEFAULT] * 20


def test_choices_are_found_together() -> None:
    plan = compiled_tiny("llama").plan
    names = sorted({product_name(w.spec.shape) for n, w in plan.weights.items() if len(w.spec.shape) == 2})
    alternatives = list(moves(plan, GPU, 2))
    assert len(alternatives) > len(DECODE_SEGMENTS) + 2

    def cost(choice: StepChoice) -> float:
        vector = choice.vector_products or ()
        return 1.0 - 0.1 * (choice.segments == 4) + sum(-0.05 if names.index(n) % 2 else 0.05 for n in vector)

    found = find(cost, alternatives)
    assert found.segments == 4 and found.vector_products
    assert all(names.index(name) % 2 for name in found.vector_products)


def test_one_row_may_go_from_the_vector_kernel_to_the_library_and_many_rows_never_come_from_it() -> None:
    plan = compiled_tiny("llama").plan

    def reached(num_seqs: int) -> list[StepChoice]:
        return [move(DEFAULT) for move in moves(plan, GPU, num_seqs)]

    one, few, many = (
        [c.vector_products for c in reached(n) if c.vector_products is not None] for n in (1, 2, MAX_VECTOR_SEQS + 1)
    )
    assert len(one) == len(few) > 2 and not many
    assert {len(products) for products in one} == {len(one) - 1} and {len(products) for products in few} == {1}


def test_queries_of_many_sequences_are_not_cut_into_many_programs() -> None:
    plan = compiled_tiny("llama").plan
    heads = plan.cache_layers[0].kv_heads

    def reached(num_seqs: int) -> list[int | None]:
        return [choice.segments for move in moves(plan, GPU, num_seqs) if (choice := move(DEFAULT)).segments]

    every = [segments for _, segments in DECODE_SEGMENTS]
    assert reached(MAX_PROGRAMS // heads // 64) == every == [1, 4, 64]
    assert reached(MAX_PROGRAMS // heads // 64 + 1) == [1, 4] and reached(MAX_PROGRAMS // heads) == [1]


def test_threads_below_all_of_torchs_are_tried_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = compiled_tiny("llama").plan
    for most, expected in ((1, []), (2, [1]), (6, [1, 2, 4]), (8, [1, 2, 4])):
        monkeypatch.setattr(measure_choices, "usable_threads", lambda most=most: most)
        assert [move(DEFAULT).num_threads for move in moves(plan, CPU, 4)] == expected


def test_a_timed_step_stays_inside_the_pool() -> None:
    for num_blocks in (2, 9, 500):
        step = decode_step(8, context=50, num_blocks=num_blocks, block_size=16, num_groups=2)
        for table, slots in zip(step.block_tables, step.slot_mappings, strict=True):
            assert table.shape == (8, 4) and table.min() >= 1 and table.max() < num_blocks
            assert (slots // 16 == table[:, -1]).all() and (slots % 16 == 49 % 16).all()
