"""Kernels on 8-bit values, routers, groups and joined rows on the device, against their reference ops in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.gpu.device_kernels import DeviceKernels

sixteen_bits = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
eight_bits = pytest.mark.parametrize("quantized", ["int8", "float8_e4m3fn"])


def check(kernels: DeviceKernels, builder: str, *args: Any, dtype: str, differ: int = 0) -> None:
    import torch

    from tests.gpu import quantized_cases

    kernels.check(getattr(quantized_cases, builder)(*args, dtype=dtype), getattr(torch, dtype), differ)


@sixteen_bits
@eight_bits
@pytest.mark.parametrize("rows", [1, 8, 70])
def test_products_of_8_bit_rows_and_weights(kernels: DeviceKernels, rows: int, quantized: str, dtype: str) -> None:
    check(kernels, "linear_w8a8_case", rows, quantized, dtype=dtype)


@sixteen_bits
@eight_bits
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_products_with_8_bit_weights(kernels: DeviceKernels, rows: int, quantized: str, dtype: str) -> None:
    check(kernels, "linear_w8_case", rows, quantized, dtype=dtype)


@sixteen_bits
@pytest.mark.parametrize("is_decode", [False, True])
def test_attention_over_an_8_bit_cache(kernels: DeviceKernels, is_decode: bool, dtype: str) -> None:
    check(kernels, "scaled_cache_case", is_decode, dtype=dtype)


@pytest.mark.parametrize("is_decode", [False, True])
def test_attention_quantizes_its_rows(kernels: DeviceKernels, is_decode: bool) -> None:
    # The reference does not round to bf16 before it quantizes: 2**-9 of 127 steps is a quarter of one.
    check(kernels, "quantized_rows_case", is_decode, dtype="bfloat16", differ=1)


@sixteen_bits
def test_rotation_and_write_to_an_8_bit_cache(kernels: DeviceKernels, dtype: str) -> None:
    check(kernels, "scaled_cache_write_case", 70, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 77])
@pytest.mark.parametrize("router", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_routers_choose_the_references_experts(kernels: DeviceKernels, router: str, rows: int) -> None:
    import torch

    from tests.gpu.quantized_cases import route_case

    kernels.check(route_case(router, rows), torch.float32)


@sixteen_bits
def test_groups_of_elementwise_ops(kernels: DeviceKernels, dtype: str) -> None:
    check(kernels, "group_case", 37, dtype=dtype)
    check(kernels, "heads_outside_tokens_case", 37, dtype=dtype)


@sixteen_bits
def test_joined_rows(kernels: DeviceKernels, dtype: str) -> None:
    check(kernels, "concat_case", 37, dtype=dtype)
