"""Activation kernels against their reference ops, in the interpreter and compiled."""

from __future__ import annotations

import pytest
import torch
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, check_budget, check_golden_source

from graphserve.kernels.activation import ACTIVATIONS
from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.triton import TritonKernel, generate
from graphserve.kernels.triton.expressions import E4M3_HELPER
from graphserve.kernels.triton.kernel import KernelText

TARGETS = [DEFAULT_TARGET, *(pytest.param(target, marks=pytest.mark.full) for target in FULL_TARGETS)]


def merged_case(act: str, rows: int, width: int, dtype: torch.dtype = torch.float32, quantized: str = "") -> Case:
    """Gate and up as column slices of one buffer, as a merged projection leaves them."""
    torch.manual_seed(rows * width)
    gate, up = torch.randn(1, rows, 2 * width).mul(3).to(dtype).chunk(2, dim=-1)
    attrs = {"act": act, "dtype": quantized} if quantized else {"act": act}
    op = "act_mul_quant" if quantized else "act_mul"
    return Case(op, op, attrs, [gate, up], {(0, 1): "T", (1, 1): "T", ("out", 1): "T"}, {"T": rows})


def serving_kernel(target: str, width: int, quantized: str = "") -> TritonKernel:
    """The kernel of a bf16 model's launch."""
    half = ArgSpec("bfloat16", (1, "T", width), (1 << 40, 2 * width, 1))
    attrs, outputs = {"act": "silu"}, [ArgSpec("bfloat16", (1, "T", width))]
    if quantized:
        attrs["dtype"] = quantized
        outputs = [ArgSpec(quantized, (1, "T", width)), ArgSpec("float32", (1, "T", 1))]
    kernel = generate("gs.act_mul_quant" if quantized else "gs.act_mul", attrs, [half, half], outputs, target)
    assert isinstance(kernel, TritonKernel), kernel
    return kernel


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_gated_and_alone(act: str) -> None:
    merged_case(act, 3, 100).check()
    x = torch.linspace(-30, 30, 5 * 33).reshape(5, 33)
    Case("alone", "activation", {"act": act}, [x], {(0, 0): "T", ("out", 0): "T"}, {"T": 5}).check()


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 1), (2, 1024), (1, 3000), (65, 64)])
def test_any_number_of_rows_and_columns(rows: int, width: int) -> None:
    merged_case("silu", rows, width).check()


@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "relu2"])
def test_fp16_is_rounded_after_each_step(act: str) -> None:
    merged_case(act, 4, 320, torch.float16).check(relative=2e-3, absolute=1e-4)


@pytest.mark.parametrize(("dtype", "target"), [("int8", DEFAULT_TARGET), ("float8_e4m3fn", "cuda:80")])
@pytest.mark.parametrize(("rows", "width"), [(5, 200), (1, 20000)])
def test_quantized_rows_held_whole_and_in_tiles(rows: int, width: int, dtype: str, target: str) -> None:
    merged_case("silu", rows, width, quantized=dtype).check(target=target)


def test_every_e4m3_code_and_the_ties_between_them_round_as_torch_rounds() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    values = torch.cat([codes, middles, torch.nextafter(middles, codes[1:]), torch.nextafter(middles, codes[:-1])])
    values = torch.cat([values, -values, torch.zeros(1024 - 2 * len(values))])
    from graphserve.kernels.arg_spec import Call
    from graphserve.kernels.triton.compile import interpret

    text = KernelText(Call("encode", {}, [ArgSpec("float32", (1024,))], [ArgSpec("uint8", (1024,))]))
    text.pointer("x_ptr", 0)
    text.output("out_ptr", 0)
    text.helper(E4M3_HELPER)
    body = "column = tl.arange(0, 1024)\ntl.store(out_ptr + column, fp32_to_e4m3(tl.load(x_ptr + column)))"
    out = torch.empty(1024, dtype=torch.uint8)
    interpret(text.build(body, (1, 1, 1), 4), [values, out], {})
    assert torch.equal(out, values.to(torch.float8_e4m3fn).view(torch.uint8))


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    rows = ArgSpec("float32", ("T", 64))
    refusal = generate("activation", {"act": "swish7"}, [rows], [rows], DEFAULT_TARGET)
    assert isinstance(refusal, Refusal) and "swish7" in refusal.reason and "silu" in refusal.reason


def test_gate_and_up_of_different_widths_are_refused() -> None:
    gate, up = ArgSpec("float32", ("T", 64)), ArgSpec("float32", ("T", 32))
    refusal = generate("act_mul", {"act": "silu"}, [gate, up], [gate], DEFAULT_TARGET)
    assert isinstance(refusal, Refusal) and "64" in refusal.reason and "32" in refusal.reason


@pytest.mark.parametrize("quantized", ["", "int8"])
def test_the_source_is_the_golden_one(quantized: str) -> None:
    check_golden_source("act_mul_quant" if quantized else "act_mul", serving_kernel(DEFAULT_TARGET, 14336, quantized))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("width", "quantized"),
    [
        (14336, ""),
        pytest.param(9728, "int8", marks=pytest.mark.full),
        pytest.param(14336, "float8_e4m3fn", marks=pytest.mark.full),
        pytest.param(28672, "int8", marks=pytest.mark.full),
    ],
)
def test_compiled_kernels_stay_within_budget(width: int, quantized: str, target: str) -> None:
    name = f"act_mul-{width}" + (f"-{quantized}" if quantized else "")
    check_budget(name, serving_kernel(target, width, quantized), target)
