"""The KV pool: views of layers and groups over one set of blocks."""

import pytest
import torch

from graphserve.plan.schema import CacheGroup, CacheSpec, Plan
from graphserve.runtime.kv_cache import KVCache


def plan_with(layers: list[CacheSpec], groups: list[CacheGroup]) -> Plan:
    return Plan({"max_model_len": 64}, [], [], {}, {}, layers, groups, (), [])


def spec(
    heads: int = 2, k_dim: int = 8, v_dim: int = 8, window: int | None = None, dtype: str = "float32"
) -> CacheSpec:
    return CacheSpec(heads, k_dim, v_dim, dtype, window)


def test_layers_of_one_group_have_memory_of_their_own() -> None:
    cache = KVCache(plan_with([spec(), spec()], [CacheGroup((0, 1))]), 4, 16, torch.device("cpu"))
    keys, values = cache.layers[0]
    assert keys.shape == (4, 2, 16, 8) and values.shape == (4, 2, 16, 8)
    keys.fill_(1.0)
    values.fill_(2.0)
    assert all(float(t.abs().sum()) == 0.0 for t in cache.layers[1])
    assert float(keys.min()) == 1.0, "values must not overlap keys"


def test_a_block_written_by_one_group_is_the_same_memory_as_the_other_groups_block() -> None:
    groups = [CacheGroup((0,)), CacheGroup((1,), window=8)]
    cache = KVCache(plan_with([spec(), spec(window=8)], groups), 4, 16, torch.device("cpu"))
    cache.layers[0][0][2].fill_(3.0)
    assert float(cache.layers[1][0][2].min()) == 3.0
    assert float(cache.layers[1][0][1].abs().sum()) == 0.0
    assert cache.num_bytes == 4 * 16 * spec().bytes_per_token


def test_layers_of_unequal_size_share_blocks_as_large_as_the_largest() -> None:
    layers = [spec(k_dim=8, v_dim=8), spec(k_dim=16, v_dim=4, window=8)]
    cache = KVCache(plan_with(layers, [CacheGroup((0,)), CacheGroup((1,), window=8)]), 3, 16, torch.device("cpu"))
    assert cache.num_bytes == 3 * 16 * layers[1].bytes_per_token
    for keys, values in cache.layers:
        assert keys.stride(0) == values.stride(0), "a block's keys and values lie in the same block"
        keys[2].fill_(1.0)
        values[2].fill_(2.0)
        assert float(keys[2].min()) == 1.0 and float(keys[1].abs().sum()) == 0.0


def test_a_layer_that_shares_another_layers_cache_gets_its_tensors() -> None:
    layers = [spec(), CacheSpec(2, 8, 8, "float32", shared_with=0)]
    cache = KVCache(plan_with(layers, [CacheGroup((0,))]), 2, 16, torch.device("cpu"))
    assert cache.layers[1][0].data_ptr() == cache.layers[0][0].data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_begin_on_cache_lines(dtype: str) -> None:
    cache = KVCache(
        plan_with([spec(heads=1, k_dim=3, v_dim=5, dtype=dtype)], [CacheGroup((0,))]), 3, 1, torch.device("cpu")
    )
    keys = cache.layers[0][0]
    assert keys.stride(0) * keys.element_size() % 64 == 0
