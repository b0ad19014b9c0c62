"""Baked RoPE: at the served length a model answers as transformers does, and no request can change another's answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphserve.errors import UnsupportedModelError
from graphserve.models.meta_model import build_meta_model, non_persistent_buffers
from graphserve.models.rope import bake_rope
from tests.tiny_models import hf_logits, text_tokens, tiny_config, tiny_model

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + i for i in range(8)],
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
MSCALED = {**LONGROPE, "long_mscale": 1.3, "short_mscale": 1.1}
MIXED = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}

# (architecture, its rope_parameters, served length, ...); 64 divides short from long, 256 bounds the dynamic ones.
CASES = {
    "longrope, long": ("phi3", LONGROPE, 90),
    "longrope, short": ("phi3", LONGROPE, 64),
    "dynamic, grown": ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 300),
    "dynamic, trained length": ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 256),
    "own scales, long": ("phimoe", MSCALED, 90),
    "own scales, short": ("phimoe", MSCALED, 64),
    "recomputed default": ("phimoe", None, 90),
    "one of two layer types": ("gemma3_text", MIXED, 90),
}


def model_for(case: str) -> tuple[nn.Module, int]:
    name, rope, length = CASES[case]
    config = tiny_config(name)
    if rope is not None:
        config.rope_parameters = rope
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = 64  # transformers lets it overrule the rope parameters
    return tiny_model(config), length


@pytest.mark.parametrize("case", CASES)
def test_a_baked_model_equals_transformers_at_the_served_length(case: str) -> None:
    model, length = model_for(case)
    ids = text_tokens(length, seed=1)
    expected = hf_logits(model, ids)
    baked, _ = model_for(case)
    bake_rope(baked, length)
    assert torch.equal(hf_logits(baked, ids), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_prefix_does_not_depend_on_what_follows(case: str) -> None:
    model, length = model_for(case)
    bake_rope(model, length)
    ids = text_tokens(length, seed=2)
    torch.testing.assert_close(hf_logits(model, ids)[:20], hf_logits(model, ids[:20]), rtol=1e-4, atol=1e-4)


def test_without_baking_a_long_request_changes_a_prefix() -> None:
    model, length = model_for("longrope, long")
    ids = text_tokens(length, seed=2)
    assert (hf_logits(model, ids)[:20] - hf_logits(model, ids[:20])).abs().max() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_buffers_of_a_baked_meta_model_equal_those_of_a_baked_cpu_model(case: str) -> None:
    model, length = model_for(case)
    bake_rope(model, length)
    meta = build_meta_model(model.config, torch.float32, "eager", "eager")
    bake_rope(meta, length)
    bake_rope(meta, length)
    found, expected = non_persistent_buffers(meta), dict(model.named_non_persistent_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_baking_for_another_length_replaces_the_first() -> None:
    model, _ = model_for("longrope, long")
    bake_rope(model, 64)
    short = model.model.rotary_emb.inv_freq.clone()
    bake_rope(model, 90)
    assert not torch.equal(model.model.rotary_emb.inv_freq, short)


def test_static_rope_is_left_alone() -> None:
    model = tiny_model(tiny_config("llama:yarn"))
    before = dict(vars(model.model.rotary_emb))
    bake_rope(model, 300)
    assert vars(model.model.rotary_emb).keys() == before.keys()
    assert model.model.rotary_emb.rope_type == "yarn"


def test_an_unknown_dynamic_type_is_refused_by_module() -> None:
    model = tiny_model(tiny_config("llama"))
    model.model.rotary_emb.rope_type = "dynamic_new"
    with pytest.raises(UnsupportedModelError, match=r"model\.rotary_emb \(LlamaRotaryEmbedding\).*'dynamic_new'"):
        bake_rope(model, 90)
