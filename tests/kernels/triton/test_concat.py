"""Joining the parts of rows: interpreted, and with tensors that are views."""

from __future__ import annotations

import pytest
import torch
from triton_kernel_cases import Case

from graphserve.kernels import arg_spec
from graphserve.kernels.triton import generate


def concat_case(*parts: torch.Tensor) -> Case:
    dynamic: dict[tuple[int | str, int], str] = {(i, 0): "T" for i in [*range(len(parts)), "out"]}  # type: ignore[misc]
    return Case(
        "concat", "concat", {"dim": -1}, list(parts), dynamic, {"T": parts[0].shape[0]},
        reference=lambda *tensors, dim: torch.cat(tensors, dim),
    )  # fmt: skip


@pytest.mark.parametrize("widths", [(16, 8), (128, 64), (1, 2, 3), (1500, 700)])
def test_parts_stand_side_by_side(widths: tuple[int, ...]) -> None:
    concat_case(*(torch.randn(5, 3, width) for width in widths)).check()


def test_a_part_that_all_heads_share_and_one_cut_from_another_tensor() -> None:
    shared = torch.randn(5, 1, 8).expand(5, 4, 8)
    cut = torch.randn(5, 4, 32)[..., 16:]
    concat_case(cut, shared).check()


def test_another_dimension_is_refused_by_number() -> None:
    spec = arg_spec.ArgSpec("float32", ("T", 4, 8))
    out = arg_spec.ArgSpec("float32", ("T", 8, 8))
    refused = generate("concat", {"dim": 1}, [spec, spec], [out], "cuda:90")
    assert isinstance(refused, arg_spec.Refusal)
    assert "only the last dimension is joined, got dim 1 of 3" in refused.reason
