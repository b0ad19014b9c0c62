"""The two ends of a step: what the references mean, and the kernels in the interpreter and compiled against them."""

from __future__ import annotations

import msgspec
import pytest
import torch
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, check_budget, check_golden_source

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.step_rules import STOPPED
from graphserve.kernels.triton import TritonKernel, generate

LANES = 5  # lane 5 is the dead one
DEAD = LANES
NO_LIMIT = 2**31 - 1


class StepCase(Case):
    """Tensors in one piece have no strides: those of ``[G, T]`` vary with the step."""

    def _spec(self, tensor: torch.Tensor, index: int | str) -> ArgSpec:
        assert tensor.is_contiguous()
        return msgspec.structs.replace(super()._spec(tensor, index), strides=None)


def prologue(host_ids: list[int], token_lanes: list[int], last_tokens: list[int], num_groups: int = 1) -> Case:
    tokens = len(host_ids)
    slots = torch.arange(100, 100 + num_groups * tokens).view(num_groups, tokens)
    args = [torch.tensor([host_ids]), slots, torch.tensor(token_lanes, dtype=torch.int32), torch.tensor(last_tokens)]
    dynamic: dict[tuple[int | str, int], str] = {(0, 1): "T", (1, 1): "T", (2, 0): "T", ("out", 1): "T"}
    return StepCase("prologue", "step_prologue", {}, args, dynamic, {"T": tokens})


def epilogue(
    token_ids: list[int],
    row_lanes: list[int],
    last_tokens: list[int],
    host_ids: list[int] | None = None,
    stop_ids: list[list[int]] | None = None,
    tokens_left: list[int] | None = None,
    ring_slot: int = 0,
    ring_rows: int = 40,
) -> Case:
    rows = len(token_ids)
    host_ids = host_ids or [7] * rows
    args = [
        torch.tensor(token_ids),
        torch.tensor([host_ids]),
        torch.arange(rows) * (len(host_ids) // rows),
        torch.tensor(row_lanes, dtype=torch.int32),
        torch.tensor(stop_ids or [[-1]] * rows, dtype=torch.int32),
        torch.tensor(tokens_left or [NO_LIMIT] * rows, dtype=torch.int32),
        torch.tensor([ring_slot], dtype=torch.int32),
        torch.tensor(last_tokens),
        torch.full((3, 2, ring_rows), -9, dtype=torch.int32),
    ]
    dynamic: dict[tuple[int | str, int], str] = {(i, 0): "R" for i in (0, 2, 3, 4, 5)} | {(1, 1): "T"}
    return StepCase("epilogue", "step_epilogue", {}, args, dynamic, {"R": rows, "T": len(host_ids)}, mutated=(7, 8))


def test_a_token_comes_from_its_lane_or_from_the_host() -> None:
    case = prologue([-1, 8, -1, 9], [2, DEAD, 0, DEAD], [40, 41, 42, 43, 44, 0])
    ids, slots = case.expected()
    assert ids.tolist() == [[42, 8, 40, 9]]
    assert slots.tolist() == [[100, 101, 102, 103]]
    case.check()


def test_a_token_of_an_ended_lane_goes_to_the_null_block_in_every_group() -> None:
    case = prologue([-1, -1, 5], [1, 3, 1], [40, STOPPED, 42, 43, 44, 0], num_groups=2)
    ids, slots = case.expected()
    assert ids.tolist() == [[0, 43, 5]], "a given token counts, whatever its lane holds"
    assert slots.tolist() == [[0, 101, 102], [0, 104, 105]]
    case.check()


@pytest.mark.parametrize("tokens", [1, 255, 256, 300])
def test_the_kernel_fills_steps_of_any_size(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    lanes = torch.randint(0, LANES, (tokens,), generator=generator).tolist()
    ids = torch.randint(-1, 3, (tokens,), generator=generator).tolist()
    prologue(ids, lanes, [10, STOPPED, 12, 13, STOPPED, 0], num_groups=3).check()


def test_sampled_tokens_are_kept_for_their_lanes_and_handed_out() -> None:
    case = epilogue([30, 31, 32], [4, DEAD, 0], [1, 2, 3, 4, 5, 0], ring_slot=2)
    last_tokens, ring = case.expected()
    assert last_tokens.tolist() == [32, 2, 3, 4, 30, 0]
    assert ring[2, :, :3].tolist() == [[30, 31, 32], [0, 0, 0]]
    assert (ring[:2] == -9).all() and (ring[2, :, 3:] == -9).all()
    case.check()


def test_a_stop_id_the_length_and_an_invalid_token_end_a_lane() -> None:
    case = epilogue(
        [30, 31, -1, 33], [0, 1, 2, 3], [9] * 6,
        stop_ids=[[30, -1], [30, -1], [-1, -1], [-1, -1]], tokens_left=[5, 2, 5, 1],
    )  # fmt: skip
    last_tokens, ring = case.expected()
    assert last_tokens.tolist() == [STOPPED, 31, STOPPED, STOPPED, 9, 9]
    assert ring[0, 0, :4].tolist() == [30, 31, -1, 33] and ring[0, 1, :4].tolist() == [1, 0, 1, 1]
    case.check()


def test_an_ended_lane_stays_ended_until_its_token_is_given() -> None:
    case = epilogue([30, 31], [0, 1], [STOPPED, STOPPED, 9, 9, 9, 0], host_ids=[-1, 6])
    last_tokens, ring = case.expected()
    assert last_tokens.tolist() == [STOPPED, 31, 9, 9, 9, 0]
    assert ring[0, 1, :2].tolist() == [1, 0]
    case.check()


def test_rows_look_at_their_own_token_of_a_longer_step() -> None:
    epilogue([30, 31], [0, 1], [STOPPED] * 6, host_ids=[6, -1, -1, 6]).check()
    last_tokens, _ = epilogue([30, 31], [0, 1], [STOPPED] * 6, host_ids=[6, -1, -1, 6]).expected()
    assert last_tokens.tolist()[:2] == [30, STOPPED]


@pytest.mark.parametrize("rows", [1, 31, 32, 40])
@pytest.mark.parametrize("stops", [1, 3])
def test_the_kernel_serves_any_number_of_rows_and_stop_ids(rows: int, stops: int) -> None:
    generator = torch.Generator().manual_seed(rows)

    def random(low: int, high: int, *shape: int) -> list:
        return torch.randint(low, high, shape or (rows,), generator=generator).tolist()

    lanes = torch.randperm(rows, generator=generator).tolist()
    last_tokens = random(-1, 6, rows + 1)
    case = epilogue(random(-1, 6), lanes, last_tokens, random(-1, 2), random(-1, 6, rows, stops), random(1, 4), 1)
    case.check()


I32, I64 = (lambda *shape, dtype=dtype: ArgSpec(dtype, shape) for dtype in ("int32", "int64"))
EPILOGUE = [
    I64("R"), I64(1, "T"), I64("R"), I32("R"), I32("R", 16), I32("R"), I32(1), I64(257), I32(2, 2, 384),
]  # fmt: skip
PROLOGUE = [I64(1, "T"), I64(2, "T"), I32("T"), I64(257)]


def serving_kernel(name: str, target: str = DEFAULT_TARGET) -> TritonKernel:
    if name == "step_prologue":
        kernel = generate(name, {}, PROLOGUE, [I64(1, "T"), I64(2, "T")], target)
    else:
        kernel = generate(name, {}, EPILOGUE, [], target)
    assert isinstance(kernel, TritonKernel), kernel
    return kernel


@pytest.mark.parametrize("name", ["step_prologue", "step_epilogue"])
def test_the_source_is_the_golden_one(name: str) -> None:
    check_golden_source(name, serving_kernel(name))


@pytest.mark.parametrize(
    "target", [DEFAULT_TARGET, *(pytest.param(target, marks=pytest.mark.full) for target in FULL_TARGETS)]
)
@pytest.mark.parametrize("name", ["step_prologue", "step_epilogue"])
def test_compiled_kernels_stay_within_budget(name: str, target: str) -> None:
    check_budget(name, serving_kernel(name, target), target, "budgets_step")


@pytest.mark.parametrize(
    ("index", "spec", "reason"),
    [
        (0, I32("R"), "token_ids is int32"),
        (4, I32("R", "S"), "must be a constant"),
        (8, I64(2, 2, 384), "ring is int64"),
    ],
)
def test_other_arguments_are_refused(index: int, spec: ArgSpec, reason: str) -> None:
    changed: list[ArgSpec | None] = [spec if i == index else arg for i, arg in enumerate(EPILOGUE)]
    refusal = generate("step_epilogue", {}, changed, [], DEFAULT_TARGET)
    assert isinstance(refusal, Refusal) and reason in refusal.reason


def test_slots_of_a_part_of_the_step_are_refused() -> None:
    args: list[ArgSpec | None] = [I64(1, 8), I64(2, 8), I32(8), I64(257)]
    refusal = generate("step_prologue", {}, args, [I64(1, 8), I64(2, 8)], DEFAULT_TARGET)
    assert isinstance(refusal, Refusal) and "all T tokens" in refusal.reason
