"""Every kernel family on the device, launched by the product's launcher, against the reference op in fp32.

Tolerances: ``tests.gpu.device_kernels.TOLERANCES``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.gpu.device_kernels import DeviceKernels

DTYPES = ("bfloat16", "float16", "float32")
NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "norm_add", "norm_add_rms_norm")
ATTENTION = (
    "prefill", "decode", "decode split", "mixed", "window", "chunk", "sinks", "sinks split", "soft cap", "alibi",
    "heads of 64", "heads of 80", "heads of 256", "one key head", "latent",
)  # fmt: skip

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def check(kernels: DeviceKernels, builder: str, *args: Any, dtype: str, differ: int = 0, **kwargs: Any) -> None:
    """Build a case by its builder's name in ``kernel_cases`` and check it."""
    import torch

    from tests.gpu import kernel_cases

    case = getattr(kernel_cases, builder)(*args, dtype=dtype, **kwargs)
    kernels.check(case, getattr(torch, dtype), differ)


@every_dtype
@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (333, 2560), (5, 100)])
def test_norms(kernels: DeviceKernels, op: str, rows: int, width: int, dtype: str) -> None:
    check(kernels, "norm_case", op, rows, width, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("op", ["rms_norm", "norm_add_rms_norm"])
def test_norms_that_scale_in_fp32_with_an_offset(kernels: DeviceKernels, op: str, dtype: str) -> None:
    check(kernels, "norm_case", op, 7, 2560, dtype=dtype, offset=1.0, weight_fp32=True)


def test_quantized_norms_differ_by_one_step_at_most(kernels: DeviceKernels) -> None:
    check(kernels, "norm_case", "rms_norm_quant", 33, 4096, dtype="float32", differ=1)
    check(kernels, "quantize_case", 33, 4096, dtype="bfloat16", differ=1)


@every_dtype
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_gated_activations(kernels: DeviceKernels, act: str, dtype: str) -> None:
    check(kernels, "act_mul_case", act, 37, 1408, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("options", [{}, {"norms": False}, {"style": "interleaved"}, {"rotary": 64}], ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_rotation_and_cache_write(kernels: DeviceKernels, tokens: int, options: dict[str, Any], dtype: str) -> None:
    check(kernels, "rope_kv_case", tokens, dtype=dtype, **options)


@every_dtype
def test_cache_write_alone(kernels: DeviceKernels, dtype: str) -> None:
    check(kernels, "kv_write_case", 70, dtype=dtype)


@every_dtype
def test_embedding_and_chosen_rows(kernels: DeviceKernels, dtype: str) -> None:
    check(kernels, "embedding_case", 90, dtype=dtype)
    check(kernels, "gather_rows_case", dtype=dtype)


@every_dtype
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 15, 16])
def test_products_of_few_rows_as_a_plan_has_them(kernels: DeviceKernels, rows: int, dtype: str) -> None:
    check(kernels, "linear_case", "linear", "default", rows, dtype=dtype)


@every_dtype
@pytest.mark.parametrize(("product", "rows"), [("gemv", 1), ("gemm", 70), ("split_k", 1), ("split_k", 16)])
def test_each_product_with_a_residual(kernels: DeviceKernels, product: str, rows: int, dtype: str) -> None:
    check(kernels, "linear_case", "linear_add", product, rows, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("is_gpt_oss", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 200])
def test_routed_experts(kernels: DeviceKernels, rows: int, is_gpt_oss: bool, dtype: str) -> None:
    check(kernels, "moe_case", rows, dtype=dtype, is_gpt_oss=is_gpt_oss)


@every_dtype
@pytest.mark.parametrize("name", ATTENTION)
def test_paged_attention(kernels: DeviceKernels, name: str, dtype: str) -> None:
    if name == "latent" and dtype == "float32":
        pytest.skip("latent heads are served from 16-bit caches")
    check(kernels, "attention_case", name, dtype=dtype)


def test_every_attention_case_is_run(kernels: DeviceKernels) -> None:
    from tests.gpu import kernel_cases

    assert tuple(kernel_cases.ATTENTION) == ATTENTION


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("vocab", [200, 1000, 128256])
def test_logits_greedy_tokens_and_logprobs(kernels: DeviceKernels, vocab: int, dtype: str) -> None:
    check(kernels, "logits_case", 7, vocab, dtype=dtype)
    check(kernels, "greedy_case", 7, vocab, dtype=dtype)
    check(kernels, "logprobs_case", 7, vocab, dtype=dtype)


@pytest.mark.parametrize("vocab", [200, 32000])
def test_drawn_tokens_equal_the_references(kernels: DeviceKernels, vocab: int) -> None:
    import torch

    from tests.gpu.kernel_cases import sample_case

    kernels.check(sample_case(16, vocab), torch.float32)


@pytest.mark.parametrize("vocab", [200, 32000])
def test_the_cut_keeps_what_the_sort_keeps(kernels: DeviceKernels, vocab: int) -> None:
    from graphserve.kernels.sampling import distances
    from tests.gpu.kernel_cases import cut_case

    case = cut_case(16, vocab)
    row_max, cut = kernels.run(case)
    expected_max, expected_cut = kernels.expected(case)
    assert (row_max == expected_max).all()
    assert case.args[0] is not None
    distance = distances(case.args[0].to(row_max.device))[1]
    kept, expected = distance <= cut[:, None], distance <= expected_cut[:, None]
    # The two exponentials may differ in the last bit, which can move the edge by one token.
    assert int((kept != expected).sum(-1).max()) <= 1


def test_the_comparison_fails_on_results_that_are_wrong(kernels: DeviceKernels) -> None:
    import torch

    from tests.gpu.device_kernels import TOLERANCES, compare
    from tests.gpu.kernel_cases import norm_case

    case = norm_case("rms_norm", 33, 2560, "bfloat16")
    (actual,), (expected,) = kernels.run(case), kernels.expected(case)
    tolerance = TOLERANCES[torch.bfloat16]
    compare(actual, expected, tolerance)
    one_wrong, one_nan, moved = actual.clone(), actual.clone(), actual.roll(1, 0)
    largest = int(expected.abs().argmax())
    one_wrong.view(-1)[largest] *= 1.1
    one_nan.view(-1)[largest] = float("nan")
    for wrong in (one_wrong, one_nan, moved, actual[:-1], torch.zeros_like(actual)):
        with pytest.raises(AssertionError):
            compare(wrong, expected, tolerance)
    with pytest.raises(AssertionError, match="1 integers differ, by up to 2"):
        compare(torch.tensor([1, 4]), torch.tensor([1, 2]), tolerance, max_integer_difference=1)


def test_a_kernel_of_another_op_is_found_out(kernels: DeviceKernels) -> None:
    import torch

    from tests.gpu.device_kernels import TOLERANCES, compare
    from tests.gpu.kernel_cases import norm_case

    (actual,) = kernels.run(norm_case("rms_norm", 33, 2560, "bfloat16", offset=0.1))
    (expected,) = kernels.expected(norm_case("rms_norm", 33, 2560, "bfloat16"))
    with pytest.raises(AssertionError):
        compare(actual, expected, TOLERANCES[torch.bfloat16])
