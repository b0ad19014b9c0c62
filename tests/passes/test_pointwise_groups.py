"""Elementwise leftovers become groups: what is taken in, what ends a group, and what is left alone with a reason."""

from __future__ import annotations

import torch
from torch import Tensor

from graphserve.kernels.pointwise_program import GROUP_OPS, ROW_OPS, PointwiseProgram
from graphserve.kernels.triton import aten_text
from graphserve.passes import pointwise_groups
from graphserve.passes.match import is_gs
from graphserve.passes.pointwise_groups import PASS
from tests.passes.checks import FIRST, rewrites
from tests.passes.graphs import TOKENS, apply, graph_of

X = torch.randn(1, TOKENS, 8)


def programs(function: object, inputs: dict[str, Tensor]) -> list[PointwiseProgram]:
    gm = graph_of(function, inputs)  # type: ignore[arg-type]
    apply(gm, *FIRST, PASS)
    return [PointwiseProgram.decode(str(n.args[1])) for n in gm.graph.nodes if is_gs(n, "pointwise")]


def test_a_chain_becomes_one_kernel() -> None:
    left = rewrites(PASS, lambda x: (torch.tanh(x / 30.0) * 30.0).to(torch.float16), {"x": X})
    assert left == ["gs.pointwise"]


def test_a_router_softmax_and_its_normalisation_are_one_group() -> None:
    def route(x: Tensor) -> Tensor:
        scores = torch.softmax(x.float(), -1)
        return scores / scores.sum(-1, keepdim=True)

    assert rewrites(PASS, route, {"x": X.half()}) == ["gs.pointwise"]


def test_a_value_that_others_read_later_is_a_further_result() -> None:
    def both(x: Tensor, w: Tensor) -> Tensor:
        doubled = x * 2.0
        activated = torch.exp(doubled) + 1.0
        return torch.nn.functional.linear(activated, w) + torch.nn.functional.linear(doubled, w)

    weights = {"w": torch.randn(8, 8)}
    left = rewrites(PASS, both, {"x": X}, weights, matches=2)
    assert left.count("gs.pointwise") == 2
    found = programs(both, {"x": X} | weights)
    assert sorted(len(p.results) for p in found) == [1, 2]


def test_a_value_that_others_read_before_the_sink_starts_a_group_of_its_own() -> None:
    def between(x: Tensor, w: Tensor) -> Tensor:
        doubled = x * 2.0
        return doubled + torch.nn.functional.linear(doubled, w)

    found = programs(between, {"x": X, "w": torch.randn(8, 8)})
    assert [len(p.instructions) for p in found] == [1, 1]


def test_a_large_graph_is_cut_into_groups_that_keep_their_values_in_registers() -> None:
    def long(x: Tensor) -> Tensor:
        for i in range(40):
            x = x * 0.5 + float(i + 1)
        return x

    found = programs(long, {"x": X})
    assert sum(len(p.instructions) for p in found) == 80
    assert max(len(p.instructions) for p in found) <= pointwise_groups.MAX_INSTRUCTIONS


def test_a_transposed_result_keeps_the_models_shape() -> None:
    rewrites(PASS, lambda x: x.transpose(1, 2).clone(memory_format=torch.contiguous_format), {"x": X})
    rewrites(PASS, lambda x: (x * 2.0).reshape(1, TOKENS, 2, 4).transpose(1, 2) + 1.0, {"x": X}, matches=2)


def test_positions_are_a_row_as_long_as_the_step() -> None:
    left = rewrites(PASS, lambda x: (x + 2) * 3, {"x": torch.arange(TOKENS)[None]})
    assert left == ["gs.pointwise"]


def test_a_reduction_over_another_dimension_is_no_member() -> None:
    left = rewrites(PASS, lambda x: x.reshape(1, TOKENS, 2, 4).sum(2), {"x": X}, matches=0)
    assert "aten.sum" in left


def test_every_op_that_may_join_a_group_has_a_triton_form() -> None:
    assert GROUP_OPS | ROW_OPS == aten_text.SUPPORTED
