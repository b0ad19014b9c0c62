"""Routed experts and routers: the interpreter against the references, compiles against budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, Case, assert_close, check_budget, check_golden_source

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.triton import TritonKernel, evaluate, generate

CLAMPED = {"act": "swiglu_clamp", "limit": 7.0, "alpha": 1.702}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def moe_case(
    rows: int = 5, num_experts: int = 6, top_k: int = 2, hidden: int = 40, inner: int = 24, *,
    dtype: torch.dtype = torch.float32, router: torch.dtype | None = None, ids: Tensor | None = None,
    bias: bool = False, **attrs: Any,
) -> Case:  # fmt: skip
    attrs = {
        "act": "silu", "transposed": False, "interleaved": False, "limit": 0.0, "alpha": 0.0, "has_gate": True,
        "weights_on_input": False, **attrs,
    }  # fmt: skip
    width = 2 * inner if attrs["has_gate"] else inner
    up = (drawn(num_experts, width, hidden) / hidden**0.5).to(dtype)
    down = (drawn(num_experts, hidden, inner) / inner**0.5).to(dtype)
    if attrs["transposed"]:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    if ids is None:
        generator = torch.Generator().manual_seed(rows)
        ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(rows)])
    weights = torch.rand(rows, top_k, generator=torch.Generator().manual_seed(1)).to(router or dtype)
    up_bias = drawn(num_experts, width, dtype=dtype) if bias else None
    down_bias = drawn(num_experts, hidden, dtype=dtype) if bias else None
    args = [drawn(rows, hidden, dtype=dtype), ids, weights, up, up_bias, down, down_bias]
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", (1, 0): "T", (2, 0): "T", ("out", 0): "T"}
    return Case("moe", "moe", attrs, args, dynamic, {"T": rows})


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_experts_equal_the_reference(rows: int) -> None:
    moe_case(rows).check()


LAYOUTS = {
    "gpt-oss": {"transposed": True, "interleaved": True, "bias": True, **CLAMPED},
    "llama4": {"transposed": True, "top_k": 1, "weights_on_input": True},
    "interleaved rows": {"interleaved": True, "act": "gelu"},
    "biases": {"bias": True, "act": "gelu_tanh"},
    "no gate": {"has_gate": False, "act": "relu2", "bias": True},
    "limit": {"limit": 0.5, "act": "silu"},
    "odd sizes": {"hidden": 50, "inner": 35, "transposed": True, "interleaved": True, **CLAMPED},
    "odd sizes, halves": {"hidden": 50, "inner": 35, "bias": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_activations(layout: str) -> None:
    moe_case(**LAYOUTS[layout]).check()


@pytest.mark.parametrize("router", [torch.float16, torch.float32])
def test_fp16_terms_are_weighted_in_the_wider_dtype(router: torch.dtype) -> None:
    moe_case(dtype=torch.float16, router=router, hidden=64, inner=64).check(4e-3, 4e-3)


def test_all_rows_on_one_expert_and_the_others_empty() -> None:
    moe_case(40, 3, 1, ids=torch.full((40, 1), 2)).check()


def test_ids_of_no_expert_add_nothing() -> None:
    ids = torch.tensor([[0, 7], [-1, 2], [6, -1]])
    case = moe_case(3, 6, 2, ids=ids)
    case.check()
    assert not case.run()[0][2].any()


def test_more_pairs_than_one_chunk_of_the_alignment_holds() -> None:
    case = moe_case(70, 2, 2, 32, 16)
    assert case.kernels()[0].constexprs["CHUNK"] < 140
    case.check()


def test_a_run_repeats_its_bits_and_a_rows_result_does_not_depend_on_the_others() -> None:
    case = moe_case(17, dtype=torch.float16)
    first = case.run()[0]
    assert torch.equal(first, case.run()[0])
    alone = moe_case(17, dtype=torch.float16)
    for index in range(3):
        tensor = alone.args[index]
        assert tensor is not None
        alone.args[index] = tensor[4:5].clone()
    alone.scalars["T"] = 1
    assert torch.equal(alone.run()[0], first[4:5])


def moe_kernels(
    name: str, rows: int, target: str = DEFAULT_TARGET, **changes: Any
) -> list[TritonKernel] | Refusal:  # fmt: skip
    e, k, h, i, gpt_oss = MODELS[name]
    bf16 = "bfloat16"
    up, down = ((e, h, 2 * i), (e, i, h)) if gpt_oss else ((e, 2 * i, h), (e, h, i))
    attrs = {
        "act": "silu", "limit": 0.0, "alpha": 0.0, "transposed": gpt_oss, "interleaved": gpt_oss, "has_gate": True,
        "weights_on_input": False, "bucket_rows": rows, **(CLAMPED if gpt_oss else {}), **changes,
    }  # fmt: skip
    args = [
        ArgSpec(bf16, ("T", h)), ArgSpec("int64", ("T", k)), ArgSpec(bf16, ("T", k)), ArgSpec(bf16, up),
        ArgSpec(bf16, (e, 2 * i)) if gpt_oss else None, ArgSpec(bf16, down), ArgSpec(bf16, (e, h)) if gpt_oss else None,
    ]  # fmt: skip
    kernels = generate("gs.moe", attrs, args, [ArgSpec(bf16, ("T", h))], target)
    assert not isinstance(kernels, TritonKernel)
    return kernels


# experts, experts a token, hidden, inner, gpt-oss's layout
MODELS = {
    "qwen3_30b_a3b": (128, 8, 2048, 768, False),
    "mixtral_8x7b": (8, 2, 4096, 14336, False),
    "gpt_oss_20b": (32, 4, 2880, 2880, True),
}


@pytest.mark.parametrize("rows", [1, 64, 2048])
def test_grids_are_bucket_limits_and_scratch_holds_every_place(rows: int) -> None:
    kernels = moe_kernels("qwen3_30b_a3b", rows)
    assert isinstance(kernels, list)
    align, up, down, total = kernels
    block, pairs = int(up.constexprs["BLOCK_M"]), rows * 8
    tiles = evaluate(up.grid[0], {"T": rows})
    # Worst cases: every pair alone on an expert, and every expert with one place more than whole tiles.
    assert tiles >= min(pairs, 128) and tiles >= min(pairs, (pairs - 128) // block + 128)
    assert block == down.constexprs["BLOCK_M"] == align.constexprs["BLOCK_M"]
    needed = pairs * (768 * 2 + 2048 * 2) + tiles * (block + 1) * 4
    assert {evaluate(k.scratch, {"T": rows}) for k in kernels} == {needed}
    assert align.grid == (128, 1, 1) and evaluate(total.grid[0], {"T": rows}) == rows


def test_what_the_kernels_do_not_cover_is_refused() -> None:
    for changes, reason in (({"act": "tanh"}, "tanh"), ({"act": "swiglu_clamp", "has_gate": False}, "needs experts")):
        refusal = moe_kernels("mixtral_8x7b", 1, **changes)
        assert isinstance(refusal, Refusal) and reason in refusal.reason


def check_moe_budget(name: str, rows: int, target: str) -> None:
    kernels = moe_kernels(name, rows, target)
    assert isinstance(kernels, list), kernels
    for kernel, part in zip(kernels, ("align", "gate_up", "down", "sum"), strict=True):
        check_budget(f"{name}.{rows}.{part}", kernel, target, "budgets_moe")


def test_compiles_stay_within_budget() -> None:
    check_moe_budget("qwen3_30b_a3b", 1, DEFAULT_TARGET)


@pytest.mark.full
@pytest.mark.parametrize("target", [DEFAULT_TARGET, *FULL_TARGETS])
@pytest.mark.parametrize("rows", [1, 2048])
@pytest.mark.parametrize("name", MODELS)
def test_compiles_stay_within_budget_for_every_model_and_target(name: str, rows: int, target: str) -> None:
    check_moe_budget(name, rows, target)


def route_case(rows: int = 3, num_experts: int = 6, bias: bool = False, **attrs: Any) -> Case:
    attrs = {
        "top_k": 2, "scores": "softmax", "normalize": "none", "eps": 0.0, "min_sum": 0.0, "scale": 1.0,
        "num_groups": 1, "top_groups": 1, "group_top": 1, "dtype": "float32", **attrs,
    }  # fmt: skip
    args = [2 * drawn(rows, num_experts), drawn(num_experts) / 4 if bias else None]
    return Case("route", "route", attrs, args, {(0, 0): "T", ("out", 0): "T"}, {"T": rows})


ROUTERS = {
    "mixtral": {"normalize": "sum"},
    "qwen3_moe": {"num_experts": 128, "top_k": 8, "normalize": "sum", "dtype": "float16"},
    "olmoe": {"num_experts": 64, "top_k": 8},
    "gpt_oss": {"num_experts": 32, "top_k": 4, "scores": "none", "normalize": "softmax"},
    "deepseek_v3": {
        "num_experts": 64, "top_k": 6, "scores": "sigmoid", "bias": True, "normalize": "sum", "eps": 1e-20,
        "scale": 2.5, "num_groups": 8, "top_groups": 4, "group_top": 2,
    },
    "deepseek_v2": {"num_experts": 40, "top_k": 6, "num_groups": 5, "top_groups": 3, "scale": 16.0},
    "ernie4_5_moe": {"bias": True, "normalize": "sum", "min_sum": 1e-12},
    "llama4": {"top_k": 1, "scores": "none", "normalize": "sigmoid"},
    "sigmoid without groups": {"scores": "sigmoid", "bias": True},
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_choose_and_weigh_as_the_reference(name: str) -> None:
    case = route_case(**ROUTERS[name])
    tolerance = 2e-3 if case.attrs["dtype"] == "float16" else 1e-5
    case.check(tolerance, tolerance)


def test_a_tie_goes_to_the_lower_id() -> None:
    case = route_case(2, 8, top_k=3)
    case.args[0] = torch.tensor([[0.0, 5, 1, 5, 5, 0, 0, 5], [1.0, 1, 1, 1, 1, 1, 1, 1]])
    assert case.run()[1].tolist() == [[1, 3, 4], [0, 1, 2]]
    assert_close(case.run()[0], case.expected()[0])


def test_the_router_of_deepseek_v3_compiles_within_budget() -> None:
    check_budget("route.deepseek_v3", deepseek_router(DEFAULT_TARGET), DEFAULT_TARGET, "budgets_moe")


@pytest.mark.full
@pytest.mark.parametrize("target", FULL_TARGETS)
def test_the_router_compiles_within_budget_on_every_target(target: str) -> None:
    check_budget("route.deepseek_v3", deepseek_router(target), target, "budgets_moe")


def deepseek_router(target: str) -> TritonKernel:
    attrs = {**route_case(**ROUTERS["deepseek_v3"]).attrs, "top_k": 8}
    outputs = [ArgSpec("float32", ("T", 8)), ArgSpec("int64", ("T", 8))]
    kernel = generate("gs.route", attrs, [ArgSpec("float32", ("T", 256)), ArgSpec("float32", (256,))], outputs, target)
    assert isinstance(kernel, TritonKernel), kernel
    return kernel


def test_the_text_is_that_of_the_golden_files() -> None:
    kernels = moe_kernels("gpt_oss_20b", 1)
    assert isinstance(kernels, list)
    for kernel, part in zip(kernels, ("align", "gate_up", "down", "sum"), strict=True):
        check_golden_source(f"moe_{part}", kernel)
    check_golden_source("route", deepseek_router(DEFAULT_TARGET))
