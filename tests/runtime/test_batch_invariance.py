"""Logits of a request alone and beside others, in small and large steps: the same bits where that is promised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.coverage_check import BLOCK_SIZE, make_step_input
from graphserve.config import EngineConfig
from graphserve.errors import ConfigError
from graphserve.kernels.cpu import compiler
from graphserve.runtime.batch_invariance import INVARIANT_ROWS
from graphserve.runtime.cpp_backend import lower_to_cpp
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.triton_plan import lower_to_triton
from tests.compiler.compiled import compiled
from tests.runtime.interpreted_runner import InterpretedRunner
from tests.tiny_models import checkpoint_tensors, text_tokens, tiny_config, tiny_model

# The interpreter casts without checking; a NaN that a mask drops later is cast like any other value.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

Chunk = tuple[int, int]  # (request, tokens of it in this step)


def tiny(
    name: str, num_layers: int, dtype: torch.dtype = torch.float32, max_model_len: int = 128
) -> tuple[Any, dict[str, torch.Tensor], Any]:
    config = tiny_config(name)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-num_layers:]
    built = compiled(config, max_model_len, dtype)
    return built.plan, checkpoint_tensors(tiny_model(config).to(dtype)), built.constants


def logits(runner: ModelRunner, prompts: list[list[int]], steps: list[list[Chunk]], padding: int = 0) -> torch.Tensor:
    """Logits of every token of request 0, ``[tokens, vocab]``.

    Args:
        steps: which requests each step computes, and how many of their next tokens.
        padding: tokens and sequences that are added to each step.
    """
    groups = range(len(runner.plan.cache_groups))
    table_len = runner.plan.model["max_model_len"] // BLOCK_SIZE
    runner.allocate_kv_cache(1 + len(prompts) * table_len * len(groups), BLOCK_SIZE)
    ids = np.arange(1, 1 + len(groups) * len(prompts) * table_len, dtype=np.int32)
    blocks = ids.reshape(len(groups), len(prompts), table_len)
    done = [0] * len(prompts)
    rows = []
    for step in steps:
        spans = [(r, range(done[r], done[r] + count)) for r, count in step]
        places = [(r, p) for r, span in spans for p in span]
        starts = np.cumsum([0, *(len(span) for _, span in spans), *[0] * padding])
        made = make_step_input(
            input_ids=[prompts[r][p] for r, p in places] + [0] * padding,
            positions=[p for _, p in places] + [0] * padding,
            query_start_loc=starts.tolist(),
            seq_lens=[span.stop for _, span in spans] + [0] * padding,
            block_tables=[
                np.concatenate([blocks[g][[r for r, _ in spans]], np.zeros((padding, table_len), np.int32)])
                for g in groups
            ],
            slot_mappings=[
                [int(blocks[g][r][p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for r, p in places] + [0] * padding
                for g in groups
            ],
            logits_indices=list(range(len(places))),
        )
        out = runner.forward(made).clone()
        rows += [row for (r, _), row in zip(places, out, strict=True) if r == 0]
        for r, span in spans:
            done[r] = span.stop
    return torch.stack(rows)


def alone(length: int, decoded: int) -> list[list[Chunk]]:
    """One request: its prompt in one step, then token by token."""
    return [[(0, length)], *[[(0, 1)]] * decoded]


def beside_others(length: int, decoded: int, others: int, chunk: int) -> list[list[Chunk]]:
    """The same request behind others in every step, its prompt in chunks."""
    chunks = [chunk] * (length // chunk) + ([length % chunk] if length % chunk else [])
    steps: list[list[Chunk]] = [[*((r, 3 + r % 2) for r in range(1, others)), (others, 1), (0, chunks[0])]]
    return steps + [[*((r, 1) for r in range(others, 0, -1)), (0, count)] for count in [*chunks[1:], *[1] * decoded]]


def prompts(length: int, decoded: int, others: int) -> list[list[int]]:
    return [text_tokens(length + decoded, seed=0), *(text_tokens(40, seed=1 + i) for i in range(others))]


def interpreted(model: Any, deterministic: bool, others: int = 5) -> tuple[list[torch.Tensor], InterpretedRunner]:
    """Logits of 6 prompt tokens and 2 more: alone, and beside others in steps of more than 16 rows."""
    runner = InterpretedRunner(*model, on_gpu=deterministic)
    texts = prompts(6, 2, others)
    return [
        logits(runner, texts[:1], alone(6, 2)),
        logits(runner, texts, beside_others(6, 2, others, chunk=4), padding=8),
    ], runner


def test_bits_of_gpu_kernels_do_not_depend_on_the_batch() -> None:
    (first, second), runner = interpreted(tiny("llama", 1), deterministic=True)
    assert runner.num_library_launches == 0
    assert torch.equal(first, second)


def test_without_the_option_the_kernels_differ_by_the_number_of_rows() -> None:
    (first, second), runner = interpreted(tiny("llama", 1), deterministic=False)
    assert runner.num_library_launches > 0
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("others", [1, 12, 40])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_bits_of_gpu_kernels_in_larger_steps(name: str, others: int) -> None:
    (first, second), _ = interpreted(tiny(name, 2), deterministic=True, others=others)
    assert torch.equal(first, second)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def on_cpu(model: Any, deterministic: bool, length: int = 600) -> list[torch.Tensor]:
    runner = ModelRunner(*model, backend="cpp", deterministic=deterministic)
    texts = prompts(length, 4, others=3)
    return [
        logits(runner, texts[:1], alone(length, 4)),
        logits(runner, texts, beside_others(length, 4, others=3, chunk=47), padding=5),
    ]


CPU_CASES = [
    ("gemma3_text", torch.float32),  # a window of 8 keys
    ("llama", torch.bfloat16),
    *(
        pytest.param(name, dtype, marks=pytest.mark.full)
        for name, dtype in (
            ("llama", torch.float32), ("gemma3_text", torch.bfloat16), ("gpt_oss", torch.float32),
            ("qwen3_moe", torch.float32), ("qwen3_moe", torch.bfloat16),
        )
    ),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(("name", "dtype"), CPU_CASES)
def test_bits_on_the_cpu_do_not_depend_on_the_batch(name: str, dtype: torch.dtype, four_threads: None) -> None:
    model = tiny(name, 2, dtype, max_model_len=1024)
    first, second = on_cpu(model, deterministic=True)
    assert torch.equal(first, second)
    if dtype == torch.float32:
        reference = logits(ModelRunner(*model, backend="reference"), prompts(600, 4, 0), alone(600, 4))
        torch.testing.assert_close(first, reference, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_without_the_option_threads_share_the_keys_of_a_step(four_threads: None) -> None:
    first, second = on_cpu(tiny("llama", 2, max_model_len=1024), deterministic=False)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second)


def llama_with_plain_torch() -> tuple[Any, KVCache]:
    plan = tiny("llama", 1)[0]
    launches = list(plan.launches)
    launches[-1] = msgspec.structs.replace(launches[-1], op="aten.mm.default", args=launches[-1].args[:2])
    return msgspec.structs.replace(plan, launches=launches), KVCache(plan, 2, BLOCK_SIZE, torch.device("meta"))


def test_launches_of_plain_torch_are_refused() -> None:
    plan, cache = llama_with_plain_torch()
    message = "deterministic=True needs a generated kernel for every launch.*none for aten.mm.default .*no {} generator"
    with pytest.raises(ConfigError, match=message.format("Triton")):
        lower_to_triton(plan, cache, "cuda:90", deterministic=True)
    with pytest.raises(ConfigError, match=message.format(r"C\+\+")):
        lower_to_cpp(plan, cache, deterministic=True)
    assert lower_to_triton(plan, cache, "cuda:90").refusals and lower_to_cpp(plan, cache).refusals


def test_the_reference_backend_and_the_tiered_start_are_refused() -> None:
    plan, parameters, constants = tiny("llama", 1)
    with pytest.raises(ConfigError, match="deterministic=True with the reference backend.*backend='auto' or 'cpp'"):
        ModelRunner(plan, parameters, constants, backend="reference", deterministic=True)
    with pytest.raises(ConfigError, match="deterministic=True with start='tiered'.*Use start='full'"):
        EngineConfig.from_kwargs(deterministic=True, start="tiered")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_plan_has_one_tile_for_all_rows_and_no_library_call(name: str) -> None:
    plan = tiny(name, 1)[0]
    cache = KVCache(plan, 2, BLOCK_SIZE, torch.device("meta"))
    lowered = lower_to_triton(plan, cache, "cuda:90", deterministic=True)
    products = [k for k in lowered.distinct_kernels().values() if k.symbol.startswith("gs_linear")]
    assert products and {k.constexprs["BLOCK_M"] for k in products} == {INVARIANT_ROWS}
    assert {launch.kind for launch in lowered.plan.launches} == {"triton", "view"}
    assert not any(lowered.is_library_product(launch, 1000) for launch in lowered.plan.launches)
    assert any(lower_to_triton(plan, cache, "cuda:90").is_library_product(x, 1000) for x in plan.launches)
