"""The row-wise check passes what treats tokens alone and names each way of mixing them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphserve.compiler.rowwise import check_rowwise
from graphserve.errors import UnsupportedModelError
from tests.passes.graphs import TOKENS, graph_of

H = 6  # width of the rows
IDS = torch.zeros(1, TOKENS, dtype=torch.int64)
WEIGHTS = {"embedding": torch.zeros(30, H), "square": torch.zeros(H, H), "table": torch.zeros(1, 64, dtype=torch.int64)}

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def check(function: Callable[..., torch.Tensor]) -> None:
    """``function(x [1, T, H], ids [1, T], square [H, H], table [1, 64])`` behind an embedding."""

    def model(
        input_ids: torch.Tensor, embedding: torch.Tensor, square: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        # Constants that a model makes are not fake tensors; a capture allows them, too.
        input_ids.fake_mode.allow_non_fake_inputs = True  # type: ignore[attr-defined]
        return function(torch.nn.functional.embedding(input_ids, embedding), input_ids, square, table)

    check_rowwise(graph_of(model, {"input_ids": IDS}, WEIGHTS))


ALONE: dict[str, Callable[..., torch.Tensor]] = {
    "elementwise": lambda x, ids, w, t: torch.sigmoid(x) * x + 1,
    "linear": lambda x, ids, w, t: torch.nn.functional.linear(x, w),
    "softmax over the row": lambda x, ids, w, t: x.softmax(-1),
    "norm of the row": lambda x, ids, w, t: torch.nn.functional.layer_norm(x, [H]),
    "heads": lambda x, ids, w, t: x.view(1, -1, 2, 3).transpose(1, 2).sum(1),
    "rows of a matrix": lambda x, ids, w, t: x.reshape(-1, H) @ w,
    "top of the row": lambda x, ids, w, t: x.topk(2, -1).values,
    "scatter within the row": lambda x, ids, w, t: torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0),
    "table by id": lambda x, ids, w, t: x * w[ids],
    "gather from a table by id": lambda x, ids, w, t: t.gather(1, ids),
    "gather within the row": lambda x, ids, w, t: x.gather(-1, x.argsort(-1)),
    "repeated for each expert": lambda x, ids, w, t: x.reshape(-1, H).repeat(3, 1).view(3, -1, H).sum(0),
    "whole slice": lambda x, ids, w, t: x[:, :],
}

MIXES: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "sum": (lambda x, ids, w, t: x.sum(1), "works along the tokens"),
    "sum of all": (lambda x, ids, w, t: x * x.sum(), "reduces over the tokens"),
    "max": (lambda x, ids, w, t: x / x.amax(1, keepdim=True), "works along the tokens"),
    "cumsum": (lambda x, ids, w, t: x.cumsum(1), "works along the tokens"),
    "softmax": (lambda x, ids, w, t: x.softmax(1), "works along the tokens"),
    "shift": (lambda x, ids, w, t: x[:, 1:], "works along the tokens"),
    "first token": (lambda x, ids, w, t: x[:, 0], "works along the tokens"),
    "roll": (lambda x, ids, w, t: x.roll(1, 1), "works along the tokens"),
    "flip": (lambda x, ids, w, t: x.flip(1), "works along the tokens"),
    "gather": (lambda x, ids, w, t: x[0][ids[0]], "gathers along the tokens"),
    "gather by place": (
        lambda x, ids, w, t: t.expand(2, 64).gather(0, ids),
        "looks up a table by the place of the token",
    ),
    "pairs": (lambda x, ids, w, t: x @ x.transpose(1, 2), "relates tokens to one another"),
    "product over tokens": (lambda x, ids, w, t: x.transpose(1, 2) @ x, "sums over the tokens"),
    "convolution": (
        lambda x, ids, w, t: torch.conv1d(x.transpose(1, 2), w[:, :, None], padding=0),
        "is not known to work on each token by itself",
    ),
    "place in the batch": (
        lambda x, ids, w, t: x + torch.arange(x.shape[1], device=x.device)[:, None],
        "numbers the tokens of the whole batch",
    ),
    "token count": (lambda x, ids, w, t: x / x.shape[1], "computes with the token count"),
    "value of the token count": (
        lambda x, ids, w, t: x * torch.full((1,), x.shape[1], device=x.device),
        "makes a value out of the token count",
    ),
    "rows of other tokens": (
        lambda x, ids, w, t: x.reshape(-1, H).repeat(2, 1).view(-1, 2, H).sum(1),
        "scatters tokens over other dimensions",
    ),
    "norm over tokens": (lambda x, ids, w, t: torch.norm(x, dim=1), "works along the tokens"),
}


@pytest.mark.parametrize("function", ALONE.values(), ids=ALONE)
def test_what_treats_each_token_alone_passes(function: Callable[..., torch.Tensor]) -> None:
    check(function)


@pytest.mark.parametrize(("function", "reason"), MIXES.values(), ids=MIXES)
def test_what_mixes_tokens_is_refused_by_op_and_reason(function: Callable[..., torch.Tensor], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^aten\.\w+.*{reason}.*; requests packed together would mix$"):
        check(function)


def test_a_write_into_a_buffer_is_refused() -> None:
    def model(input_ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return seen.add_(1) + input_ids[..., None]

    gm = graph_of(model, {"input_ids": IDS}, {"seen": torch.zeros(H)})
    with pytest.raises(UnsupportedModelError, match="writes into a buffer of the model"):
        check_rowwise(gm)


def test_a_graph_without_input_ids_is_refused() -> None:
    gm = graph_of(lambda w: w * 2, {}, {"w": torch.zeros(TOKENS)})
    with pytest.raises(UnsupportedModelError, match="does not read input_ids"):
        check_rowwise(gm)


def test_the_refusal_names_module_and_class() -> None:
    gm = graph_of(lambda x: x.sum(1), {"input_ids": torch.zeros(1, TOKENS, H)})
    for node in gm.graph.nodes:
        node.meta |= {"gs_module": "model.layers.0.mixer", "gs_class": "TokenMixer"}
    with pytest.raises(
        UnsupportedModelError, match=r"aten\.sum\.dim_IntList in model\.layers\.0\.mixer \(TokenMixer\)"
    ):
        check_rowwise(gm)
