"""Logits of a few layers of the 8B Llama shape with random bf16 weights beside those of eager `transformers`.

The truth is `transformers` in fp32 with the same weights. bf16 rounds in both runs, so ours is held against the
distance that `transformers` itself has in bf16: the mean error over all positions may be at most :data:`FACTOR` times
as large. The prompt runs whole, in chunks of several steps, and with its last tokens one a step as in decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.coverage_check import make_step_input
from graphserve.compiler.build import build_plan
from graphserve.compiler.capture import register_interfaces
from graphserve.models.meta_model import build_meta_model, non_persistent_buffers
from graphserve.models.rope import bake_rope
from graphserve.runtime.model_runner import ModelRunner
from tests.compiler.published_configs import LLAMA_3_1_8B, published

LAYERS, BLOCK_SIZE, MAX_MODEL_LEN = 3, 16, 4352
PROMPT_LEN = 512
FACTOR = 1.25
# Tokens of each step.
SPLITS: dict[str, tuple[int, ...]] = {
    "whole prompt": (PROMPT_LEN,),
    "chunks": (200, 7, 256, 49),
    "chunk, then one token a step": (PROMPT_LEN - 16, *[1] * 16),
}


def measure_logits(device: torch.device, layers: int = LAYERS, prompt_len: int = PROMPT_LEN) -> dict[str, Any]:
    """Errors of each way to run the prompt; ``holds`` says whether all are within the factor."""
    return compare_logits(published(LLAMA_3_1_8B | {"num_hidden_layers": layers}), device, prompt_len, SPLITS)


def compare_logits(
    config: transformers.PretrainedConfig, device: torch.device, prompt_len: int, splits: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The same for any config; each split adds up to the prompt."""
    tokens = np.random.default_rng(0).integers(10, config.vocab_size, prompt_len).tolist()
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    _randomize(model.eval())
    ours = dict(_our_logits(config, model, tokens, device, splits))
    ids = torch.tensor([tokens], device=device)
    with torch.inference_mode():
        theirs = model(ids, use_cache=False).logits[0].float()
        truth = model.float()(ids, use_cache=False).logits[0]
    scale = float(truth.abs().mean())
    limit = _error(theirs, truth) / scale
    result: dict[str, Any] = {
        "model": f"Llama-3.1-8B shape, {config.num_hidden_layers} layers, random weights, {prompt_len} positions",
        "factor_allowed": FACTOR,
        "transformers_bf16": _row(theirs, truth, limit),
        "ours": {name: _row(logits.to(device), truth, limit) for name, logits in ours.items()},
    }
    result["holds"] = all(row["times_transformers"] <= FACTOR for row in result["ours"].values())
    return result


def _randomize(model: torch.nn.Module) -> None:
    """Matrices of standard deviation 0.02; norm weights, which rounding must not make all alike, around 1."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, deviation = (1.0, 0.1) if parameter.dim() == 1 else (0.0, 0.02)
            parameter.normal_(mean, deviation, generator=generator)


def _our_logits(
    config: transformers.PretrainedConfig,
    model: torch.nn.Module,
    tokens: Sequence[int],
    device: torch.device,
    splits: dict[str, tuple[int, ...]],
) -> Iterator[tuple[str, torch.Tensor]]:
    register_interfaces()
    meta = build_meta_model(config, torch.bfloat16)
    bake_rope(meta, MAX_MODEL_LEN)
    built = build_plan(meta, MAX_MODEL_LEN, non_persistent_buffers(meta))
    runner = ModelRunner(built.plan, dict(model.named_parameters()), built.constants, device=device)
    runner.allocate_kv_cache(2 + len(tokens) // BLOCK_SIZE, BLOCK_SIZE)
    for name, split in splits.items():
        assert sum(split) == len(tokens), f"{name} has {sum(split)} of {len(tokens)} tokens"
        yield name, _run(runner, tokens, split)
    runner.close()


def _run(runner: ModelRunner, tokens: Sequence[int], split: Sequence[int]) -> torch.Tensor:
    """Logits ``[tokens, vocab]`` in fp32 on the CPU, of as many steps as the split has parts."""
    table = np.arange(1, 1 + -(-len(tokens) // BLOCK_SIZE), dtype=np.int32)[None]
    parts, start = [], 0
    for count in split:
        places = list(range(start, start + count))
        step = make_step_input(
            input_ids=[tokens[place] for place in places],
            positions=places,
            query_start_loc=[0, count],
            seq_lens=[start + count],
            block_tables=[table],
            slot_mappings=[[int(table[0, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in places]],
            logits_indices=list(range(count)),
        )
        with torch.inference_mode():
            parts.append(runner.forward(step).float().cpu())
        start += count
    return torch.cat(parts)


def _row(logits: torch.Tensor, truth: torch.Tensor, limit: float) -> dict[str, float]:
    """``limit``: the relative mean error of `transformers` in bf16."""
    mean = _error(logits, truth) / float(truth.abs().mean())
    same = (logits.argmax(-1) == truth.argmax(-1)).float().mean()
    worst = float(((logits - truth).abs().mean(-1) / truth.abs().mean(-1)).max())
    return {
        "mean_error": round(mean, 5),
        "worst_position": round(worst, 5),
        "times_transformers": round(mean / limit, 3),
        "same_argmax": round(float(same), 4),
    }


def _error(logits: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean absolute difference; nan, which no limit allows, where a logit is not finite."""
    return float((logits - truth).abs().mean())
