"""The attention kernels of real models, compiled without a GPU: registers, memory, loads, matrix instructions."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
from triton_kernel_cases import DEFAULT_TARGET, FULL_TARGETS, check_budget, check_golden_source

from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.triton import TritonKernel, generate
from graphserve.kernels.triton.compile import compile_for

# Most bytes of shared memory a program can ask for.
SHARED_BYTES = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "cuda:100": 227 << 10, "hip:gfx942": 64 << 10}


class Model(NamedTuple):
    """What an attention layer of a model looks like."""

    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    block_size: int = 16
    window: int = 0
    sinks: bool = False
    is_latent: bool = False
    cache_dtype: str = "bfloat16"
    rows_dtype: str = ""  # of a result that is quantized by rows
    dtype: str = "bfloat16"


MODELS = {
    "llama-3.1-8b": Model(32, 8, 128, 128),
    "llama-3.1-8b, 8-bit cache": Model(32, 8, 128, 128, cache_dtype="float8_e4m3fn"),
    "gemma-3-4b, window": Model(8, 4, 256, 256, window=1024),
    "gemma-3-4b, full": Model(8, 4, 256, 256),
    "gpt-oss": Model(64, 8, 64, 64, sinks=True),
    "gpt-oss, window": Model(64, 8, 64, 64, sinks=True, window=128),
    "latent attention": Model(128, 1, 576, 512, block_size=64, is_latent=True),
    "phi-2": Model(32, 32, 80, 80),
    "llama-3.1-8b, int8 result": Model(32, 8, 128, 128, rows_dtype="int8"),
    "gpt-oss, 8-bit float result": Model(64, 8, 64, 64, sinks=True, rows_dtype="float8_e4m3fn"),
    "128 heads, int8 result": Model(128, 8, 128, 128, rows_dtype="int8"),
}
STEPS: dict[str, dict[str, int]] = {"mixed": {}, "decode": {"max_query_len": 1}}
STEPS["split"] = {"max_query_len": 1, "segments": 16}


def attention_kernels(model: Model, step: dict[str, int], target: str) -> list[TritonKernel]:
    """The kernels of one layer."""
    heads, kv_heads, k_dim, v_dim, block_size = model[:5]
    k_size = kv_heads * block_size * k_dim
    v_size = 0 if model.is_latent else kv_heads * block_size * v_dim
    v_row = k_dim if model.is_latent else v_dim
    is_scaled = model.cache_dtype != model.dtype
    args = [
        ArgSpec(model.dtype, ("T", heads, k_dim)),
        ArgSpec(model.cache_dtype, ("num_blocks", kv_heads, block_size, k_dim),
                (k_size + v_size, block_size * k_dim, k_dim, 1)),
        ArgSpec(model.cache_dtype, ("num_blocks", kv_heads, block_size, v_dim),
                (k_size + v_size, block_size * v_row, v_row, 1)),
        ArgSpec("int32", ("S", "B_0")),
        ArgSpec("int32", ("S+1",)),
        ArgSpec("int32", ("S",)),
        ArgSpec(model.dtype, (heads,)) if model.sinks else None,
        None,
        *([ArgSpec("float32", (1,)), ArgSpec("float32", (1,)), None] if is_scaled else []),
    ]  # fmt: skip
    attrs: dict[str, Any] = {"scale": k_dim**-0.5, "window": model.window, "chunk": 0, "softcap": 0.0, "causal": True}
    attrs |= step | ({"value_is_key_prefix": True} if model.is_latent else {})
    op = "gs.paged_attention_quant" if is_scaled else "gs.paged_attention"
    outputs = [ArgSpec(model.rows_dtype or model.dtype, ("T", heads * v_dim))]
    if model.rows_dtype:
        op, attrs["dtype"] = "gs.paged_attention_quant_rows", model.rows_dtype
        outputs.append(ArgSpec("float32", ("T", 1)))
    kernels = generate(op, attrs, args, outputs, target)
    assert not isinstance(kernels, Refusal), kernels
    return [kernels] if isinstance(kernels, TritonKernel) else kernels


def check_budgets(model: str, step: str, target: str) -> None:
    """Every kernel of a launch within its budget, without spills and within the target's shared memory."""
    for i, kernel in enumerate(attention_kernels(MODELS[model], STEPS[step], target)):
        name = f"{model}: {step}" + (", reduce" if i else "")
        compiled = compile_for(kernel, target)
        assert compiled.num_spills == 0 and compiled.shared_bytes <= SHARED_BYTES[target], name
        assert compiled.num_vector_loads_128 > 0, name
        assert compiled.num_mma > 0 or i == 1, name
        check_budget(name, kernel, target, "budgets_attention")


@pytest.mark.parametrize("step", ["mixed", "split"])
def test_the_kernels_of_a_llama_stay_within_budget(step: str) -> None:
    check_budgets("llama-3.1-8b", step, DEFAULT_TARGET)


@pytest.mark.full
@pytest.mark.parametrize("target", [DEFAULT_TARGET, *FULL_TARGETS])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model", MODELS)
def test_the_kernels_of_every_model_stay_within_budget(model: str, step: str, target: str) -> None:
    check_budgets(model, step, target)


@pytest.mark.full
@pytest.mark.parametrize("target", [DEFAULT_TARGET, *FULL_TARGETS])
@pytest.mark.parametrize("dims", [(8, 8), (40, 40), (72, 72), (96, 96), (112, 112), (160, 160), (192, 128), (512, 512)])
def test_every_head_size_compiles_without_spills(dims: tuple[int, int], target: str) -> None:
    for step in STEPS.values():
        for kernel in attention_kernels(Model(8, 2, *dims), step, target):
            compiled = compile_for(kernel, target)
            assert compiled.num_spills == 0 and compiled.shared_bytes <= SHARED_BYTES[target], (dims, step, target)


@pytest.mark.full
@pytest.mark.parametrize("target", [DEFAULT_TARGET, *FULL_TARGETS])
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
def test_attention_in_full_precision_compiles_without_spills(dim: int, target: str) -> None:
    model = Model(8, 2, dim, dim, dtype="float32", cache_dtype="float32")
    for step in STEPS.values():
        for kernel in attention_kernels(model, step, target):
            compiled = compile_for(kernel, target)
            assert compiled.num_spills == 0 and compiled.shared_bytes <= SHARED_BYTES[target], (dim, step, target)


@pytest.mark.full
@pytest.mark.parametrize("target", [DEFAULT_TARGET, *FULL_TARGETS])
def test_an_encoders_kernel_stays_within_budget(target: str) -> None:
    merged = ArgSpec("bfloat16", ("T", 12, 64), (3 * 12 * 64, 64, 1))
    attrs = {"scale": 0.125, "window": 0, "chunk": 0, "softcap": 0.0, "causal": False}
    args = [merged, merged, merged, ArgSpec("int32", ("S+1",)), None, None]
    kernel = generate("gs.packed_attention", attrs, args, [ArgSpec("bfloat16", ("T", 768))], target)
    assert isinstance(kernel, TritonKernel), kernel
    assert compile_for(kernel, target).num_mma > 0
    check_budget("bert-base", kernel, target, "budgets_attention")


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt-oss, window"])
def test_the_copies_of_keys_and_values_have_a_whole_step_to_arrive(model: str) -> None:
    """A loop step waits for the copies that the step before last started, and not for the two of the last."""
    (kernel,) = attention_kernels(MODELS[model], STEPS["mixed"], "cuda:90")
    first_loop, *_ = re.findall(r"cp\.async\.wait_group\s+(\d+)", compile_for(kernel, "cuda:90").asm)
    assert first_loop == "2"


def test_a_latent_cache_is_read_once_for_keys_and_values() -> None:
    latent = attention_kernels(MODELS["latent attention"], STEPS["decode"], DEFAULT_TARGET)[0]
    assert (
        "kv_v_ptr" not in latent.source
        and len(latent.arguments)
        == len(attention_kernels(MODELS["phi-2"], STEPS["decode"], DEFAULT_TARGET)[0].arguments) - 1
    )


def test_the_text_of_a_llamas_kernels_is_the_golden_one() -> None:
    (mixed,) = attention_kernels(MODELS["llama-3.1-8b"], STEPS["mixed"], DEFAULT_TARGET)
    segments, reduce = attention_kernels(MODELS["llama-3.1-8b"], STEPS["split"], DEFAULT_TARGET)
    check_golden_source("paged_attention", mixed)
    check_golden_source("paged_attention_segment", segments)
    check_golden_source("paged_attention_reduce", reduce)
