"""References of the quantized ops against fp64 and against what a quantizer promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphserve.kernels import register_all
from graphserve.kernels.quantize import quantize_rows
from graphserve.kernels.quantized_linear import linear_w8, linear_w8a8, quantize_weight, weight_scale

register_all()
# Largest rounding error: half a step for int8; 1/16 of the value, or half the smallest step, for e4m3.
DTYPES = ["int8", "float8_e4m3fn"]


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.floats(1e-6, 1e6), st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_a_quantized_value_is_within_half_a_step(rows: int, width: int, size: float, seed: int, dtype: str) -> None:
    x = drawn(rows, width, seed=seed, scale=size)
    values, scale = quantize_rows(x, dtype)
    assert values.dtype == getattr(torch, dtype) and values.shape == x.shape and scale.shape == (rows, 1)
    error = (values.double() * scale.double() - x.double()).abs()
    half_step = scale.double() * (0.5 if dtype == "int8" else 2.0**-10)
    if dtype == "float8_e4m3fn":
        half_step = torch.maximum(half_step, x.double().abs() / 16)
    assert bool((error <= half_step * 1.001).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_and_a_row_of_one_value(dtype: str) -> None:
    values, scale = quantize_rows(torch.tensor([[0.0, 0.0], [-3.0, 3.0]]), dtype)
    limit = 127 if dtype == "int8" else 448
    assert values.float().tolist() == [[0, 0], [-limit, limit]]
    assert scale[1].item() == pytest.approx(3 / limit) and bool(torch.isfinite(scale).all())


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="int4.*int8, float8_e4m3fn"):
        quantize_rows(torch.zeros(1, 1), "int4")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_of_quantized_rows_is_that_of_their_values(dtype: str, with_bias: bool) -> None:
    # 3000 products of up to 127 * 127 exceed what fp32 adds exactly.
    x, weight, bias = drawn(2, 3, 3000), drawn(20, 3000, seed=1), drawn(20, seed=2) if with_bias else None
    values, scale = quantize_rows(x, dtype)
    packed, channels = quantize_weight(weight, dtype), weight_scale(weight, dtype)
    wide = (values.double() * scale.double()) @ (packed.double() * channels.double()[:, None]).t()
    expected = wide if bias is None else wide + bias.double()
    out = linear_w8a8(values, scale, packed, channels, bias, "float32")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    half = linear_w8a8(values, scale, packed, channels, bias, "bfloat16")
    assert half.dtype == torch.bfloat16 and half.shape == (2, 3, 20)
    alone = linear_w8(x, packed, channels, bias)
    exact = x.double() @ (packed.double() * channels.double()[:, None]).t()
    torch.testing.assert_close(alone.double(), exact if bias is None else exact + bias.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fakes_have_the_shapes_and_dtypes_of_results(dtype: str) -> None:
    gs = torch.ops.gs
    x, weight = torch.zeros(2, 3, 16), torch.zeros(5, 16)
    values, scale = quantize_rows(x, dtype)
    packed, channels = quantize_weight(weight, dtype), weight_scale(weight, dtype)
    for op, args in (
        (gs.quantize_weight, (weight, dtype)),
        (gs.weight_scale, (weight, dtype)),
        (gs.linear_w8, (x, packed, channels, None)),
        (gs.linear_w8a8, (values, scale, packed, channels, None, "bfloat16")),
    ):
        real = op(*args)
        fake = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
