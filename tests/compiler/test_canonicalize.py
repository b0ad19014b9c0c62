"""A canonical graph has no device moves, assertions or hidden constants, and numbers tokens by their positions."""

from __future__ import annotations

import pytest
import torch

from graphserve.compiler.canonicalize import canonicalize
from graphserve.errors import UnsupportedModelError
from tests.passes.graphs import TOKENS, graph_of, ops

IDS = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64)}
X = {"input_ids": torch.zeros(1, TOKENS, 6)}


def test_moves_to_a_device_vanish_and_casts_stay() -> None:
    gm = graph_of(lambda x: x.to("meta").to(x.device, torch.bfloat16).to(torch.float32) * 2, X)
    canonicalize(gm)
    assert ops(gm) == ["aten.to", "aten.to", "aten.mul"]
    assert [str(n.args[1]) for n in gm.graph.nodes if n.name.startswith("to")] == ["torch.bfloat16", "torch.float32"]


def test_what_gives_back_its_argument_vanishes() -> None:
    gm = graph_of(lambda x: torch.dropout(x.contiguous().detach(), 0.5, False) + 1, X)
    canonicalize(gm)
    assert ops(gm) == ["aten.add"]


def test_dropout_in_training_stays() -> None:
    gm = graph_of(lambda x: torch.dropout(x, 0.5, True), X)
    canonicalize(gm)
    assert "aten.dropout" in ops(gm)


def test_second_names_of_ops_become_the_first() -> None:
    gm = graph_of(lambda x: torch.concat([x, x], -1), X)
    canonicalize(gm)
    assert ops(gm) == ["aten.cat"]
    gm = graph_of(lambda x: (x > 0) | (x < 1), X)
    canonicalize(gm)
    assert ops(gm)[-1] == "aten.bitwise_or"


def test_numbering_the_tokens_means_their_positions() -> None:
    gm = graph_of(lambda x: torch.arange(x.shape[1], device=x.device), IDS)
    canonicalize(gm)
    assert ops(gm)[-1] == "aten.select" and "aten.arange" not in ops(gm)
    (positions,) = [n for n in gm.graph.nodes if n.meta.get("gs_input") == "positions"]
    assert (positions.op, positions.meta["val"].dtype) == ("placeholder", torch.int64)
    assert positions.meta["val"].shape == next(iter(gm.graph.nodes)).meta["val"].shape


def test_numbers_of_another_dtype_are_cast() -> None:
    gm = graph_of(lambda x: torch.arange(x.shape[1], device=x.device, dtype=torch.float32), IDS)
    canonicalize(gm)
    assert ops(gm)[-2:] == ["aten.select", "aten.to"]


@pytest.mark.parametrize("bounds", [(1, 1), (0, 3)], ids=["from one", "step three"])
def test_other_numberings_stay_for_the_row_wise_check_to_refuse(bounds: tuple[int, int]) -> None:
    start, step = bounds
    gm = graph_of(lambda x: torch.arange(start, start + step * x.shape[1], step, device=x.device), IDS)
    canonicalize(gm)
    assert "aten.arange" in ops(gm)


def test_a_constant_becomes_a_weight_and_equal_constants_become_one() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        x.fake_mode.allow_non_fake_inputs = True  # type: ignore[attr-defined]
        return x * torch.tensor(3.0) + torch.tensor(3.0) - torch.tensor(-0.0) + torch.tensor(0.0)

    gm = graph_of(model, X)
    constants = canonicalize(gm)
    assert [str(value.item()) for value in constants.values()] == ["3.0", "-0.0", "0.0"]
    assert not any(n.op == "get_attr" for n in gm.graph.nodes)
    weights = [n.meta["gs_weight"] for n in gm.graph.nodes if "gs_weight" in n.meta]
    assert weights == list(constants)
    assert len(next(n for n in gm.graph.nodes if n.meta.get("gs_weight") == weights[0]).users) == 2


def test_a_constant_without_a_value_is_refused() -> None:
    table = torch.zeros(6, device="meta")

    def model(x: torch.Tensor) -> torch.Tensor:
        x.fake_mode.allow_non_fake_inputs = True  # type: ignore[attr-defined]
        return x * table

    with pytest.raises(UnsupportedModelError, match="constant without a value"):
        canonicalize(graph_of(model, X))


def test_assertions_vanish() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        torch.ops.aten._assert_tensor_metadata.default(x, None, None, torch.float32)
        return x + 1

    gm = graph_of(model, X)
    canonicalize(gm)
    assert ops(gm) == ["aten.add"]
