"""Tiny random models, compiled, equal transformers at every position of packed requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.coverage_check import (
    BLOCK_SIZE,
    DECODE_STEPS,
    PROMPT_LENS,
    TOLERANCE,
    PackedRun,
    check_architecture,
    judge,
    relative_error,
    worst_position_error,
)
from benchmarks.coverage_configs import NAMED, NAMED_RIGHT_OR_REFUSED, VARIANTS
from graphserve.plan.schema import CacheGroup
from graphserve.runtime.step_input import StepInput
from tests.tiny_models import checkpoint_tensors, hf_logits, text_tokens, tiny_config, tiny_model

# One of each kind: plain, post-norms and softcap, chunked attention with experts, learned positions, parallel residual,
# sinks, latent attention with grouped routing, two rope tables.
DEFAULT_RUN = (
    "llama",
    "gemma2",
    "llama4_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "deepseek_v3",
    "phi3:longrope",
)
COMPILED_DEFAULT_RUN = ("qwen3", "mixtral")


@pytest.mark.parametrize("name", DEFAULT_RUN)
def test_packed_logits_equal_transformers(name: str) -> None:
    row = check_architecture(name)
    assert (row.result, row.reason) == ("right", "")


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in NAMED if name not in DEFAULT_RUN])
def test_packed_logits_of_every_named_architecture_equal_transformers(name: str) -> None:
    row = check_architecture(name)
    assert (row.result, row.reason) == ("right", "")


@pytest.mark.full
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_right_where_its_architecture_is_served(name: str) -> None:
    row = check_architecture(name)
    if check_architecture(name.split(":")[0]).result == "refused":
        assert row.result == "refused" and row.reason
    else:
        assert (row.result, row.reason) == ("right", "")


@pytest.mark.full
@pytest.mark.parametrize("name", NAMED_RIGHT_OR_REFUSED)
def test_unusual_architecture_is_right_or_refused_with_a_reason(name: str) -> None:
    row = check_architecture(name)
    assert row.result == "right" or (row.result == "refused" and row.reason)


@pytest.mark.parametrize("name", COMPILED_DEFAULT_RUN)
def test_packed_logits_of_compiled_launches_equal_transformers(name: str) -> None:
    row = check_architecture(name, backend="cpp")
    assert (row.result, row.reason) == ("right", "")
    assert row.launches.get("cpp", 0) > 0


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in NAMED if name not in COMPILED_DEFAULT_RUN])
def test_packed_logits_of_compiled_launches_of_every_named_architecture_equal_transformers(name: str) -> None:
    row = check_architecture(name, backend="cpp")
    assert (row.result, row.reason) == ("right", "")


class TokenRecallRunner:
    """Stands in for a model runner: its KV cache holds token ids, and its logits are HF's of the tokens found there.

    It shows that the step inputs are consistent, and with a fault switched on, that the job notices the fault.
    """

    def __init__(self, model: torch.nn.Module, fault: str = "") -> None:
        self.plan: Any = SimpleNamespace(cache_groups=[CacheGroup((0,)), CacheGroup((1,), window=8)])
        self._model = model
        self._fault = fault

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> None:
        self._kv = np.full((len(self.plan.cache_groups), num_blocks * block_size), -1)

    def forward(self, step: StepInput) -> torch.Tensor:
        for kv, slots in zip(self._kv, step.slot_mappings, strict=True):
            real = slots >= BLOCK_SIZE  # block 0 is the null block
            kv[slots[real]] = step.input_ids[real]
        rows = [self._sequence(step, s) for s in range(step.num_sequences)]
        return torch.cat(rows)[torch.from_numpy(step.logits_indices)]

    def _sequence(self, step: StepInput, s: int) -> torch.Tensor:
        start, end = step.query_start_loc[s : s + 2]
        positions = np.arange(step.seq_lens[s])
        assert step.positions[start:end].tolist() == positions[-(end - start) :].tolist()
        per_group = [
            kv[table[s][positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE]
            for kv, table in zip(self._kv, step.block_tables, strict=True)
        ]
        tokens = per_group[0].tolist()
        assert tokens == per_group[1].tolist() and -1 not in tokens
        if self._fault == "reads a neighbour":
            tokens[0] = int(step.input_ids[start - 1])
        logits = hf_logits(self._model, tokens)[-(end - start) :]
        return logits * (1 + 3 * TOLERANCE) if self._fault == "inexact" else logits


def run_recall(fault: str, forced: list[list[int]] | None = None, middle_seed: int = 1) -> PackedRun:
    runner = TokenRecallRunner(tiny_model(tiny_config("llama")), fault)
    prompts = [text_tokens(n, seed=seed) for n, seed in zip(PROMPT_LENS, (0, middle_seed, 2), strict=True)]
    return PackedRun(runner, prompts, forced)


def worst_errors(fault: str) -> tuple[float, float]:
    """(error against transformers, change by another request) of the recall runner with a fault."""
    first = run_recall(fault)
    ours = first.run()
    model = tiny_model(tiny_config("llama"))
    truth = [hf_logits(model, tokens) for tokens in first.tokens]
    others = run_recall(fault, first.decoded(), middle_seed=1000).run()
    error = max(relative_error(a, b) for a, b in zip(ours, truth, strict=True))
    return error, max(relative_error(others[i], ours[i]) for i in (0, 2))


def test_the_packed_run_feeds_every_token_of_every_request_once() -> None:
    run = run_recall("")
    logits = run.run()
    assert [len(rows) for rows in logits] == [n + DECODE_STEPS for n in PROMPT_LENS]
    assert [len(tokens) for tokens in run.tokens] == [n + DECODE_STEPS for n in PROMPT_LENS]
    assert [int(rows[-DECODE_STEPS - 1].argmax()) for rows in logits] == [tokens[0] for tokens in run.decoded()]


def test_the_job_accepts_a_faultless_runner() -> None:
    assert judge(*worst_errors(""))[0] == "right"


@pytest.mark.parametrize("fault", ["reads a neighbour", "inexact"])
def test_the_job_notices_a_fault(fault: str) -> None:
    assert judge(*worst_errors(fault))[0] == "wrong"


def test_the_job_notices_a_request_that_depends_on_another() -> None:
    assert worst_errors("reads a neighbour")[1] > 1e-3


@pytest.mark.parametrize(("error", "isolation"), [(float("nan"), 0.0), (0.0, float("nan")), (2e-4, 0.0), (0.0, 2e-5)])
def test_errors_beyond_tolerance_and_nan_are_wrong(error: float, isolation: float) -> None:
    assert judge(error, isolation)[0] == "wrong"


def test_compiled_launches_must_give_the_same_bits_whoever_is_beside() -> None:
    assert judge(0.0, 0.0, "cpp")[0] == "right"
    assert judge(0.0, 1e-9, "cpp")[0] == "wrong"


def test_the_position_error_is_relative_to_its_own_position() -> None:
    truth = torch.tensor([[10.0, 0.0], [0.1, 0.0]])
    ours = truth + torch.tensor([[0.0, 0.0], [0.05, 0.0]])
    assert relative_error(ours, truth) == pytest.approx(0.005)
    assert worst_position_error(ours, truth) == pytest.approx(0.5)


def test_randomised_weights_depend_on_name_and_seed_only_and_leave_norms_near_one() -> None:
    first, again, other = (checkpoint_tensors(tiny_model(tiny_config("llama"), seed)) for seed in (0, 0, 1))
    norm = "model.layers.0.input_layernorm.weight"
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[matrix], other[matrix])
    assert not torch.equal(first[matrix], first["model.layers.1.mlp.up_proj.weight"])
    assert float(first[norm].mean()) == pytest.approx(1.0, abs=0.1)
    assert float(first[norm].std()) == pytest.approx(0.2, abs=0.06)
    assert float(first[matrix].std()) == pytest.approx(0.2, abs=0.02)


def test_tiny_configs_show_every_layer_type() -> None:
    names = ("gemma3_text", "llama4_text", "qwen2", "cohere2")
    text_configs = {name: tiny_config(name).get_text_config() for name in names}
    assert {name: set(config.layer_types) for name, config in text_configs.items()} == {
        "gemma3_text": {"sliding_attention", "full_attention"},
        "llama4_text": {"chunked_attention", "full_attention"},
        "qwen2": {"sliding_attention", "full_attention"},
        "cohere2": {"sliding_attention", "full_attention"},
    }
    assert all(config.num_hidden_layers >= 4 for config in text_configs.values())
    assert text_configs["gemma3_text"].sliding_window == 8
    assert text_configs["llama4_text"].attention_chunk_size == 16
