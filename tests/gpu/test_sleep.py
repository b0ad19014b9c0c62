"""Weights and KV pool in virtual memory of a real device: memory goes and comes back, graphs and tokens stay.

Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

POOL_BYTES = 1 << 30
RETURNED = 0.95  # of the memory of weights and pool


def test_torch_writes_and_reads_memory_that_was_unmapped_and_mapped_again(device: torch.device) -> None:
    import torch

    from graphserve.runtime.virtual_memory import VirtualArena

    free_bytes = torch.cuda.mem_get_info(device)[0]
    arena = VirtualArena(3 << 30, device)
    first, second = arena.allocate((1 << 20,), torch.float32), arena.allocate((512, 1024), torch.bfloat16)
    address = first.data_ptr()
    for _ in range(2):
        first.fill_(2.0)
        second.fill_(1.0)
        assert float((second @ second.t()).float().mean()) == 1024.0 and float(first.sum()) == float(2 << 20)
        arena.unmap()
        assert free_bytes - torch.cuda.mem_get_info(device)[0] < 256 << 20
        arena.map()
        assert first.data_ptr() == address and free_bytes - torch.cuda.mem_get_info(device)[0] >= 3 << 30
    arena.close()


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeping_engine_returns_memory_and_wakes_with_its_graphs(device: torch.device, level: int) -> None:
    import torch

    from graphserve import LLM, SamplingParams
    from graphserve.demo import demo_path

    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    with LLM(str(demo_path()), device="cuda", max_model_len=128, kv_cache_memory_bytes=POOL_BYTES) as llm:

        def tokens() -> list[list[int]]:
            outputs = llm.generate(["Once upon a time", "The little dog"], params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        before = tokens()
        free_bytes = torch.cuda.mem_get_info(device)[0]
        llm.sleep(level)
        assert torch.cuda.mem_get_info(device)[0] - free_bytes >= RETURNED * POOL_BYTES
        llm.wake_up()
        assert tokens() == before
