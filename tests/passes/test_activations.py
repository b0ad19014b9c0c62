"""activation and glu: spellings and near misses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.passes.activation import PASS as ACTIVATION
from graphserve.passes.glu import PASS as GLU
from tests.passes.checks import ignores, refuses, rewrites
from tests.passes.graphs import TOKENS

FORMS = {
    "silu": [F.silu, lambda x: x * torch.sigmoid(x), lambda x: torch.sigmoid(x) * x],
    "gelu": [F.gelu, lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))],
    "gelu_tanh": [
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    ],
    "quick_gelu": [lambda x: x * torch.sigmoid(1.702 * x)],
    "relu": [F.relu],
}


def _x(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": torch.randn(1, TOKENS, 8, generator=torch.Generator().manual_seed(0)).to(dtype)}


@pytest.mark.parametrize("act", FORMS)
def test_every_spelling_of_an_activation_becomes_one_op(act: str) -> None:
    for form in FORMS[act]:
        assert rewrites(ACTIVATION, form, _x()) == ["gs.activation"]


def test_squared_relu_is_one_activation() -> None:
    for square in (lambda x: F.relu(x).square(), lambda x: F.relu(x).pow(2)):
        assert rewrites(ACTIVATION, square, _x(), matches=2) == ["gs.activation"]


def test_an_activation_whose_inside_is_used_elsewhere_is_refused() -> None:
    def shared(x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return x * gate + gate

    refuses(ACTIVATION, shared, _x(), reason="used elsewhere")


def test_near_activations_are_none() -> None:
    ignores(ACTIVATION, lambda x: x * torch.sigmoid(1.5 * x), _x())
    ignores(ACTIVATION, lambda x: (x + 1) * torch.sigmoid(x), _x())
    ignores(ACTIVATION, lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * x.pow(3)))), _x())
    ignores(ACTIVATION, lambda x: x * 0.5 * (2.0 + torch.erf(x / math.sqrt(2.0))), _x())


def test_gate_times_up_becomes_one_op_in_either_order_and_from_a_merged_buffer() -> None:
    two = _x() | {"u": torch.randn(1, TOKENS, 8)}
    assert rewrites(GLU, lambda x, u: F.silu(x) * u, two, before=(ACTIVATION,)) == ["gs.act_mul"]
    assert rewrites(GLU, lambda x, u: u * F.gelu(x), two, before=(ACTIVATION,)) == ["gs.act_mul"]
    assert rewrites(GLU, lambda x, u: u * torch.sigmoid(x), two) == ["gs.act_mul"]

    def merged(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return up * F.silu(gate)

    assert rewrites(GLU, merged, _x(), before=(ACTIVATION,)) == ["aten.slice", "aten.slice", "gs.act_mul"]


def test_glu_refuses_other_products() -> None:
    narrow = _x() | {"u": torch.randn(1, TOKENS, 1)}
    refuses(GLU, lambda x, u: x * torch.sigmoid(u), narrow, reason="shapes")
    mixed = _x(torch.bfloat16) | {"u": torch.randn(1, TOKENS, 8)}
    refuses(GLU, lambda x, u: F.silu(x) * u, mixed, before=(ACTIVATION,), reason="gate is torch.bfloat16")

    def shared(x: Tensor) -> Tensor:
        gated = F.silu(x)
        return gated * (x + 1) + gated

    refuses(GLU, shared, _x(), before=(ACTIVATION,), reason="used elsewhere")
    ignores(GLU, lambda x: F.silu(x) * 2.0, _x(), before=(ACTIVATION,))
