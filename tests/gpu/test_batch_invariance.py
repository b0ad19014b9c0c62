"""Batch invariance on the device, in the dtype that models are served in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch


@pytest.mark.parametrize("others", [1, 40])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_bf16_bits_do_not_depend_on_the_batch(name: str, others: int, device: torch.device) -> None:
    import torch

    from graphserve.runtime.model_runner import ModelRunner
    from tests.runtime.test_batch_invariance import alone, beside_others, logits, prompts, tiny

    runner = ModelRunner(*tiny(name, 2, torch.bfloat16, max_model_len=1024), device=device, deterministic=True)
    texts = prompts(600, 8, others)
    first = logits(runner, texts[:1], alone(600, 8))
    for chunk in (47, 128, 256):
        assert torch.equal(first, logits(runner, texts, beside_others(600, 8, others, chunk), padding=chunk % 9))
