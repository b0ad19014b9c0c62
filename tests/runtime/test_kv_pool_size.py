import pytest
from engine.fake_model import fake_plan
from hypothesis import given
from hypothesis import strategies as st

from graphserve.errors import ConfigError
from graphserve.plan.schema import CacheGroup, CacheSpec
from graphserve.runtime.kv_pool_size import (
    KVPoolRequirements,
    default_pool_bytes_on_cpu,
    kv_bytes_per_token,
    max_blocks_in_group,
    plan_num_blocks,
)
from graphserve.runtime.memory import available_host_bytes

TWO_LAYERS = (CacheGroup((0, 1)),)


def requirements(groups=TWO_LAYERS, max_model_len=100, max_num_seqs=4, max_chunk=100):
    return KVPoolRequirements(groups, 32, 16, max_model_len, max_num_seqs, max_chunk)


def test_a_pool_tensor_holds_the_largest_layer_of_any_group():
    plan = fake_plan([CacheGroup((0, 2)), CacheGroup((1,), window=8)])
    plan.cache_layers = [
        CacheSpec(2, 8, 8, "float32"),
        CacheSpec(4, 8, 8, "float32"),
        CacheSpec(2, 4, 4, "bfloat16"),
    ]
    assert kv_bytes_per_token(plan) == 4 * 16 * 4 + 2 * 8 * 2


def test_never_more_than_all_requests_can_use():
    assert plan_num_blocks(requirements(), 1 << 40) == 4 * 7 + 1


def test_memory_bounds_the_pool():
    assert plan_num_blocks(requirements(), 10 * 16 * 32 + 5) == 10


def test_a_pool_too_small_for_one_request_is_refused():
    with pytest.raises(ConfigError, match="max_model_len=100 .* lower max_model_len or raise kv_cache_memory_bytes"):
        plan_num_blocks(requirements(), 7 * 16 * 32)


def test_the_override_is_taken_as_it_is():
    assert plan_num_blocks(requirements(), 0, override=3) == 3


def test_windowed_groups_need_only_what_can_be_seen():
    groups = (CacheGroup((0,)), CacheGroup((1,), window=16))
    assert plan_num_blocks(requirements(groups, 1600, 1, 16), 1 << 40) == 100 + 3 + 1


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9), st.integers(1, 200))
def test_a_windowed_request_never_holds_more_than_the_bound(window, chunk, block_size, length):
    """By walking through the steps: blocks from the first visible token to the last computed one."""
    group = CacheGroup((0,), window=window)
    most = 0
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        first = max(0, start - window + 1)
        most = max(most, -(-end // block_size) - first // block_size)
    assert most <= max_blocks_in_group(group, length, chunk, block_size)


def test_default_memory():
    assert default_pool_bytes_on_cpu(1 << 30) == int(0.4 * (1 << 30))
    assert default_pool_bytes_on_cpu(1 << 40) == 4 << 30


def test_a_container_limit_counts_as_the_machine(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 10 kB\nMemAvailable:   1000 kB\n")
    assert available_host_bytes(meminfo, tmp_path) == 1_024_000
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("100000\n")
    assert available_host_bytes(meminfo, tmp_path) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_host_bytes(meminfo, tmp_path) == 1_024_000
