"""Row gathers against their references, in the interpreter and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, check_budget, check_golden_source

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.triton import TritonKernel, generate

TARGETS = [DEFAULT_TARGET, *(pytest.param(target, marks=pytest.mark.full) for target in FULL_TARGETS)]


def chosen_rows(x: Tensor, indices: Tensor) -> Tensor:
    return x.index_select(1, indices)


def serving_kernel(target: str) -> TritonKernel:
    ids, table = ArgSpec("int64", (1, "T")), ArgSpec("bfloat16", (128256, 4096))
    kernel = generate("gs.embedding", {}, [ids, table], [ArgSpec("bfloat16", (1, "T", 4096))], target)
    assert isinstance(kernel, TritonKernel), kernel
    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (7, 100), (33, 16), (2, 2500)])
def test_embedding_copies_the_rows_of_the_ids(tokens: int, width: int, dtype: torch.dtype) -> None:
    table = torch.randn(50, width).mul(100).to(dtype)
    ids = torch.randint(0, 50, (1, tokens))
    Case("embedding", "embedding", {}, [ids, table], {(0, 1): "T", ("out", 1): "T"}, {"T": tokens}).check()


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_chosen_rows_of_a_strided_tensor(index_dtype: torch.dtype) -> None:
    x = torch.randn(1, 9, 3, 40)[:, :, 1]
    indices = torch.tensor([8, 0, 3], dtype=index_dtype)
    dynamic: dict[tuple[int | str, int], str] = {(0, 1): "T", (1, 0): "R", ("out", 1): "R"}
    Case("rows", "gather_rows", {}, [x, indices], dynamic, {"T": 9, "R": 3}, reference=chosen_rows).check()


def test_a_result_of_another_dtype_is_refused() -> None:
    ids, table = ArgSpec("int64", ("T",)), ArgSpec("bfloat16", (100, 64))
    refusal = generate("embedding", {}, [ids, table], [ArgSpec("float32", ("T", 64))], DEFAULT_TARGET)
    assert isinstance(refusal, Refusal) and "bfloat16" in refusal.reason


def test_float_indices_are_refused() -> None:
    ids, table = ArgSpec("float32", ("T",)), ArgSpec("bfloat16", (100, 64))
    refusal = generate("embedding", {}, [ids, table], [ArgSpec("bfloat16", ("T", 64))], DEFAULT_TARGET)
    assert isinstance(refusal, Refusal) and "int64 or int32" in refusal.reason


def test_the_source_is_the_golden_one() -> None:
    check_golden_source("embedding", serving_kernel(DEFAULT_TARGET))


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels_stay_within_budget(target: str) -> None:
    check_budget("embedding-4096", serving_kernel(target), target)
