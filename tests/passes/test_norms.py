"""rms_norm, layer_norm and add_norm: their spellings, and what they must leave alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphserve.passes.add_norm import PASS as ADD_NORM
from graphserve.passes.layer_norm import PASS as LAYER_NORM
from graphserve.passes.rms_norm import PASS as RMS_NORM
from tests.passes.checks import ignores, refuses, rewrites
from tests.passes.graphs import TOKENS

D = 8


def _x(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": torch.randn(1, TOKENS, D, generator=torch.Generator().manual_seed(0)).to(dtype)}


def _w(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"w": torch.randn(D, generator=torch.Generator().manual_seed(1)).to(dtype)}


def _n(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _v(square: Tensor) -> Tensor:
    return square.mean(-1, keepdim=True) + 1e-5


RMS_FORMS = {
    "llama": lambda x, w: w * _n(x.float()).to(x.dtype),
    "llama, weight right": lambda x, w: _n(x.float()).to(x.dtype) * w,
    "gemma": lambda x, w: (_n(x.float()) * (1.0 + w.float())).type_as(x),
    "gpt-oss": lambda x, w: (w * _n(x.float())).to(x.dtype),
    "offset in the model's dtype": lambda x, w: (w + 1) * _n(x.float()).to(x.dtype),
    "no weight": lambda x, w: _n(x.float()).to(x.dtype) + w,
    "product with itself": lambda x, w: w * (x.float() * torch.rsqrt(_v(x.float() * x.float()))).to(x.dtype),
    "square": lambda x, w: w * (x.float() * torch.rsqrt(_v(x.float().square()))).to(x.dtype),
    "root below": lambda x, w: w * (x.float() / torch.sqrt(_v(x.float().pow(2)))).to(x.dtype),
    "one over root": lambda x, w: w * (x.float() * (1 / torch.sqrt(_v(x.float().pow(2))))).to(x.dtype),
    "power -0.5": lambda x, w: w * (x.float() * _v(x.float().pow(2)).pow(-0.5)).to(x.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", RMS_FORMS)
def test_every_spelling_of_rms_norm_becomes_one_op(form: str, dtype: torch.dtype) -> None:
    left = rewrites(RMS_NORM, RMS_FORMS[form], _x(dtype), _w(dtype))
    assert left.count("gs.rms_norm") == 1
    assert not {"aten.rsqrt", "aten.sqrt", "aten.pow", "aten.mean", "aten.mul", "aten.to"} & set(left)


def test_the_library_call_becomes_the_op() -> None:
    assert rewrites(RMS_NORM, lambda x, w: F.rms_norm(x, (D,), w, 1e-6), _x(), _w()) == ["gs.rms_norm"]


def test_a_weight_per_head_stays_outside_the_norm() -> None:
    x = {"x": torch.randn(1, TOKENS, 2, D)}
    left = rewrites(RMS_NORM, lambda x, w: w * _n(x), x, {"w": torch.randn(2, D)})
    assert left == ["gs.rms_norm", "aten.mul"]


def test_a_wide_result_that_is_used_itself_is_a_norm_of_the_wide_input() -> None:
    left = rewrites(RMS_NORM, lambda x: _n(x.float()), _x(torch.bfloat16))
    assert left == ["aten.to", "gs.rms_norm"]


def test_a_mean_of_squares_in_bf16_is_refused() -> None:
    refuses(RMS_NORM, lambda x, w: w * _n(x), _x(torch.bfloat16), _w(torch.bfloat16), reason="bfloat16, not in float32")


def test_a_library_norm_over_two_dimensions_is_refused() -> None:
    refuses(RMS_NORM, lambda x: F.rms_norm(x.unflatten(-1, (2, 4)), (2, 4)), _x(), reason="2 dimensions")


def test_a_mean_over_another_axis_is_no_norm() -> None:
    ignores(RMS_NORM, lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), _x())


def test_another_factor_than_the_input_is_no_norm() -> None:
    ignores(RMS_NORM, lambda x: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), _x())


def _centred(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5)


def test_layer_norm_in_its_spellings_becomes_one_op() -> None:
    assert rewrites(LAYER_NORM, lambda x, w: F.layer_norm(x, (D,), w, w, 1e-5), _x(), _w()) == ["gs.layer_norm"]
    assert rewrites(LAYER_NORM, lambda x: F.layer_norm(x, (D,), None, None, 1e-5), _x()) == ["gs.layer_norm"]
    cohere = rewrites(LAYER_NORM, lambda x, w: w * _centred(x), _x(), _w())
    assert cohere == ["gs.layer_norm"]


def test_layer_norm_takes_in_the_casts_around_it() -> None:
    wide = rewrites(LAYER_NORM, lambda x: F.layer_norm(x.float(), (D,)).to(x.dtype), _x(torch.bfloat16))
    assert wide == ["gs.layer_norm"]
    spelled = rewrites(
        LAYER_NORM,
        lambda x, w: (w.float() * _centred(x.float())).to(x.dtype),
        _x(torch.bfloat16), _w(torch.bfloat16), tolerance=1e-2,
    )  # fmt: skip
    assert spelled == ["gs.layer_norm"]


def test_layer_norm_refuses_what_it_cannot_express() -> None:
    refuses(LAYER_NORM, lambda x: F.layer_norm(x.unflatten(-1, (2, 4)), (2, 4)), _x(), reason="2 dimensions")
    refuses(LAYER_NORM, _centred, _x(torch.bfloat16), reason="bfloat16, not in float32")
    refuses(LAYER_NORM, lambda x, w: (w + 1) * _centred(x), _x(), _w(), reason="no weight offset")
    ignores(LAYER_NORM, lambda x, w: w * _n(x), _x(), _w())


def _two() -> dict[str, Tensor]:
    return _x() | {"r": torch.randn(1, TOKENS, D)}


@pytest.mark.parametrize("norm", [RMS_NORM, LAYER_NORM])
def test_a_sum_and_its_norm_become_one_op_and_both_results_stay(norm) -> None:
    def block(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        total = r + x
        return total * (w * _n(total) if norm is RMS_NORM else F.layer_norm(total, (D,), w))

    left = rewrites(ADD_NORM, block, _two(), _w(), before=(norm,))
    assert "aten.add" not in left and len([op for op in left if op.startswith("gs.add_")]) == 1


def test_only_the_first_of_two_norms_takes_the_sum() -> None:
    def block(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        total = x + r
        return F.layer_norm(total, (D,), w) + F.layer_norm(total, (D,), None, w)

    left = rewrites(ADD_NORM, block, _two(), _w(), before=(LAYER_NORM,))
    assert left.count("gs.add_layer_norm") == 1 and left.count("gs.layer_norm") == 1


def test_add_norm_leaves_other_sums_alone() -> None:
    before = (LAYER_NORM,)
    refuses(ADD_NORM, lambda x: F.layer_norm(x + 1.5, (D,)), _x(), before=before, reason="adds the number")
    refuses(ADD_NORM, lambda x, w: F.layer_norm(x + w, (D,)), _x(), _w(), before=before, reason="broadcast")
    mixed = {"x": _x(torch.bfloat16)["x"], "r": torch.randn(1, TOKENS, D)}
    refuses(ADD_NORM, lambda x, r: F.layer_norm(x + r, (D,)), mixed, before=before, reason="is torch.bfloat16")
    ignores(ADD_NORM, lambda x, r: r + F.layer_norm(x, (D,)), _two(), before=before)  # the norm comes first (OLMo 2)
    ignores(ADD_NORM, lambda x, r: F.layer_norm(torch.add(x, r, alpha=2), (D,)), _two(), before=before)
