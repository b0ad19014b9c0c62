"""What plain torch takes beside the buffers, launch by launch: measured, and no more than the memory plan counts."""

from __future__ import annotations

import msgspec
import pytest
import torch

from graphserve.config import EngineConfig
from graphserve.kernels import register_all
from graphserve.plan.runner import StepSize
from graphserve.plan.schema import Plan
from graphserve.runtime.memory_plan import GRAPH_BYTES, largest_step, plan_memory
from graphserve.runtime.model_runner import ModelRunner
from graphserve.runtime.plain_torch import plain_sampler_bytes, plain_torch_bytes
from graphserve.runtime.step_plan import VARIANTS
from tests.compiler.compiled import compiled
from tests.peak_memory import peak_bytes
from tests.runtime.step_models import BLOCK_SIZE, CPU, DeviceRunner, table_plan
from tests.tiny_models import checkpoint_tensors, tiny_config, tiny_model

NUM_TOKENS, NUM_ROWS, LONGEST = 512, 64, 512
SMALL = 1 << 16  # lists of ids, positions and the like
GIB = 1 << 30


def bound_runner(name: str, quantization: str | None) -> ModelRunner:
    """A runner of a tiny model in bf16, whose step is the prefill of one sequence as long as there is."""
    config = tiny_config(name)
    built = compiled(config, LONGEST, torch.bfloat16, quantization=quantization)
    tensors = checkpoint_tensors(tiny_model(config))
    parameters = {key: x.bfloat16() if x.is_floating_point() else x for key, x in tensors.items()}
    runner = ModelRunner(built.plan, parameters, built.constants, backend="reference")
    runner.allocate_kv_cache(LONGEST // 16 + 1, 16)
    runner.reserve(NUM_TOKENS, NUM_ROWS, 1)
    inputs = runner._inputs
    inputs["input_ids"].random_(3, 100)
    inputs["positions"][0] = torch.arange(NUM_TOKENS)
    inputs["logits_indices"][:] = torch.arange(NUM_ROWS)
    inputs["query_start_loc"][1] = inputs["seq_lens"][0] = NUM_TOKENS
    for group in range(len(built.plan.cache_groups)):
        inputs[f"slot_mapping.{group}"][:] = torch.arange(16, 16 + NUM_TOKENS)
        inputs[f"block_table.{group}"][0] = torch.arange(1, LONGEST // 16 + 1)
    return runner


def alone(plan: Plan, index: int) -> Plan:
    """The plan with one launch that works, and the views, which say what it reads."""
    launches = [x for i, x in enumerate(plan.launches) if x.kind == "view" or i == index]
    return msgspec.structs.replace(plan, launches=launches)


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("gemma3_text", None),
        ("qwen3_moe", None),
        ("llama", "int8_w8a8"),
        ("llama", "fp8_per_channel"),
    ],
)
def test_no_launch_takes_more_than_is_counted(name: str, quantization: str | None) -> None:
    runner = bound_runner(name, quantization)
    plan = runner.plan
    working = [i for i, launch in enumerate(plan.launches) if launch.kind != "view"]
    measured: dict[tuple[str, int], int] = {}  # by op and what is counted: one of those that are alike will do
    with torch.inference_mode():
        bound = runner._runner.bind(StepSize((NUM_TOKENS, NUM_ROWS, 1)))
        for index, (launch, action) in zip(working, bound.launches, strict=True):
            counted = plain_torch_bytes(alone(plan, index), NUM_TOKENS, NUM_ROWS, LONGEST)
            if (launch.op, counted) in measured:
                action()
                continue
            measured[launch.op, counted] = taken = peak_bytes(action)
            assert taken <= counted + SMALL, f"{launch.op} takes {taken} bytes, counted {counted}"
    counted = plain_torch_bytes(plan, NUM_TOKENS, NUM_ROWS, LONGEST)
    assert counted < 2 * max(measured.values()), "much more is counted than is taken"
    runner.close()


def test_no_launch_of_the_sampler_takes_more_than_is_counted() -> None:
    vocab, rows = 4096, 64
    runner = DeviceRunner(table_plan(vocab), {"table": torch.zeros(vocab, vocab)}, CPU)
    runner.allocate(64, BLOCK_SIZE, StepSize((rows, rows, rows)), rows)
    most = 0
    with torch.inference_mode():
        for variant in VARIANTS:
            for _, action in runner.bound(variant, StepSize((rows, rows, rows))).launches:
                most = max(most, peak_bytes(action))
    counted = plain_sampler_bytes(rows * vocab)
    assert most <= counted < 2 * most
    runner.close()


def test_a_tiered_start_counts_plain_torch_and_gives_its_place_to_graphs() -> None:
    register_all()
    plan = compiled(tiny_config("llama"), 128).plan
    for device_bytes in (None, GIB):
        full, tiered = (
            plan_memory(plan, EngineConfig(start=start, max_num_seqs=4), GIB, device_bytes)
            for start in ("full", "tiered")
        )
        assert full.plain_torch_bytes == 0 and "plain torch" not in str(full)
        tokens, rows, _ = largest_step(EngineConfig(max_num_seqs=4), 128, on_device=device_bytes is not None)
        assert tiered.plain_torch_bytes >= plain_torch_bytes(plan, tokens, rows, 128) > 0
        assert "plain torch until kernels are built 0.0" in str(tiered)
        others = tiered.weight_bytes + tiered.workspace_bytes + tiered.kv_bytes
        assert tiered.total_bytes == others + max(tiered.plain_torch_bytes, tiered.graph_bytes)
    assert tiered.graph_bytes == GRAPH_BYTES and ", then graphs 0.27 GB" in str(tiered)
