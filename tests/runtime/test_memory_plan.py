"""What a model takes of the memory, before it is loaded."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphserve.config import EngineConfig
from graphserve.errors import ConfigError
from graphserve.plan.schema import CacheGroup, Plan
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.kv_pool_size import KVPoolRequirements, max_blocks_in_group
from graphserve.runtime.memory_plan import GRAPH_BYTES, fit_max_model_len, plan_memory
from graphserve.runtime.model_runner import ModelRunner
from tests.compiler.compiled import compiled_tiny
from tests.tiny_models import checkpoint_tensors, tiny_config, tiny_model

GIB = 1 << 30


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compiled_tiny("gemma3_text").plan


def config(**options: object) -> EngineConfig:
    return EngineConfig.from_kwargs(model="tiny", **options)


def test_weights_and_pool_are_what_a_runner_then_holds() -> None:
    built = compiled_tiny("llama")
    planned = plan_memory(built.plan, config(max_num_seqs=4), GIB)
    parameters = checkpoint_tensors(tiny_model(tiny_config("llama")))
    runner = ModelRunner(built.plan, parameters, built.constants, backend="reference")
    assert planned.weight_bytes == runner.weight_bytes
    pool = KVCache(built.plan, planned.num_blocks, 16, torch.device("meta"))
    assert planned.kv_bytes == pool.num_bytes


def test_a_gpu_gives_its_share_whatever_others_use(plan: Plan) -> None:
    options = {"gpu_memory_utilization": 0.5, "max_num_seqs": 256}
    planned = plan_memory(plan, config(**options), free_bytes=7 * GIB, device_bytes=8 * GIB)
    assert planned.budget_bytes == 4 * GIB and planned.graph_bytes == GRAPH_BYTES
    assert planned.total_bytes <= planned.budget_bytes
    eager = plan_memory(plan, config(enforce_eager=True, **options), 7 * GIB, 8 * GIB)
    assert eager.graph_bytes == 0


def test_a_share_of_the_gpu_that_is_not_free_is_refused_unless_the_pool_is_set(plan: Plan) -> None:
    with pytest.raises(
        ConfigError, match=r"=0.92 of 8.59 GB is 7.90 GB, but only 6.44 GB are free: .* lower it to 0.7"
    ):
        plan_memory(plan, config(), free_bytes=6 * GIB, device_bytes=8 * GIB)
    planned = plan_memory(plan, config(kv_cache_memory_bytes=1 << 30), free_bytes=6 * GIB, device_bytes=8 * GIB)
    assert planned.budget_bytes == 6 * GIB and planned.kv_bytes <= 1 << 30
    assert plan_memory(plan, config(num_gpu_blocks_override=9), 6 * GIB, 8 * GIB).num_blocks == 9


def test_what_the_user_sets_is_taken_as_it_is(plan: Plan) -> None:
    assert plan_memory(plan, config(num_gpu_blocks_override=7), GIB).num_blocks == 7
    planned = plan_memory(plan, config(kv_cache_memory_bytes=1 << 20, max_num_seqs=256), GIB)
    assert planned.kv_bytes <= 1 << 20 < planned.kv_bytes + planned.block_bytes
    with pytest.raises(ConfigError, match="max_model_len=128 tokens needs"):
        plan_memory(plan, config(kv_cache_memory_bytes=4096, max_model_len=128), GIB)


def test_the_longest_request_is_cut_to_what_the_pool_holds(plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    whole = plan_memory(plan, config(max_num_seqs=1), GIB)
    assert whole.max_model_len == 128
    cut = plan_memory(plan, config(max_num_seqs=1, kv_cache_memory_bytes=whole.kv_bytes // 2), GIB)
    assert 16 <= cut.max_model_len < 128 and cut.kv_bytes <= whole.kv_bytes // 2
    assert f"max_model_len is {cut.max_model_len} instead of the model's 128" in caplog.text


def test_a_model_that_does_not_fit_is_refused_with_its_sizes(plan: Plan) -> None:
    with pytest.raises(ConfigError, match=r"weights 0\.\d\d GB, buffers .* leave nothing of 0\.00 GB"):
        plan_memory(plan, config(), free_bytes=1000)


def test_the_plan_is_shown_in_gigabytes(plan: Plan) -> None:
    planned = msgspec.structs.replace(plan_memory(plan, config(), GIB), weight_bytes=990_000_000)
    lines = planned.lines()
    assert lines[0].startswith("memory plan: weights 0.99 GB, KV cache ")
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == ["2 layers, window 8", "2 layers, full"]
    assert lines[-1].startswith("  left: ")


@given(
    st.lists(st.sampled_from([None, 8, 40, 1000]), min_size=1, max_size=3), st.sampled_from([4, 16]),
    st.integers(2, 400), st.integers(1, 300), st.integers(1, 300),
)  # fmt: skip
def test_no_longer_request_would_fit(
    windows: list[int | None], block_size: int, num_blocks: int, longest: int, chunk: int
) -> None:
    groups = [CacheGroup((i,), window=window) for i, window in enumerate(windows)]
    wanted = KVPoolRequirements(groups, 32, block_size, longest, 4, min(chunk, longest))

    def blocks(length: int) -> int:
        step = min(chunk, length)
        return 1 + sum(max_blocks_in_group(g, length, step, block_size) for g in groups)

    fitted = fit_max_model_len(wanted, num_blocks * wanted.block_bytes)
    assert fitted <= longest
    if fitted < longest:
        assert blocks(fitted + block_size) > num_blocks
    if fitted > block_size:
        assert blocks(fitted) <= num_blocks
