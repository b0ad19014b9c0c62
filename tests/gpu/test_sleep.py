"""Weights and KV pool in virtual memory of a real device: memory goes and comes back, graphs and tokens stay.

What is free is a number of the whole device, so these tests hold only while no other process uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 4 * 2 * 2 * 64 * 2 * 16  # of the demo: layers, keys and values, heads of 64, bf16, tokens
POOL_BYTES = 1 << 30


def test_torch_writes_and_reads_memory_that_was_unmapped_and_mapped_again(device: torch.device) -> None:
    import torch

    from graphserve.runtime.virtual_memory import VirtualArena

    torch.cuda.empty_cache()  # mapping does it too, which would look like memory that came back
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
    # A number of blocks: of the bytes it is given a pool takes no more than max_num_seqs requests can use.
    num_blocks = POOL_BYTES // BLOCK_BYTES
    with LLM(str(demo_path()), device="cuda", max_model_len=128, num_gpu_blocks_override=num_blocks) as llm:

        def tokens() -> list[list[int]]:
            outputs = llm.generate(["Once upon a time", "The little dog"], params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        before = tokens()
        free_bytes = torch.cuda.mem_get_info(device)[0]
        llm.sleep(level)
        assert torch.cuda.mem_get_info(device)[0] - free_bytes >= POOL_BYTES
        llm.wake_up()
        assert free_bytes - torch.cuda.mem_get_info(device)[0] < 64 << 20
        assert tokens() == before
