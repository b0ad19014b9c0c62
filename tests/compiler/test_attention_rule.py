"""Each layer's visibility rule comes out of the unmodified model, or the model is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import masking_utils

from graphserve.compiler.attention_rule import AttentionRule, decode_rule, encode_rule, reconcile, recorded_masks
from graphserve.compiler.capture import register_interfaces
from graphserve.errors import UnsupportedModelError
from graphserve.models.meta_model import build_meta_model
from tests.compiler.compiled import compiled
from tests.tiny_models import tiny_config


@pytest.mark.parametrize(
    "rule",
    [
        AttentionRule(),
        AttentionRule(window=8),
        AttentionRule(chunk=16),
        AttentionRule(causal=False, unsupported="bidirectional mask"),
        AttentionRule(unsupported="a reason | with bars"),
    ],
)
def test_a_rule_survives_the_way_through_the_model(rule: AttentionRule) -> None:
    assert decode_rule(encode_rule(rule)) == rule


def test_no_mask_is_no_rule_and_a_mask_of_the_models_own_is_an_error() -> None:
    assert decode_rule(None) is None
    with pytest.raises(ValueError, match="the attention mask is a Tensor that the model computed itself"):
        decode_rule(torch.zeros(1, 1, 4, 4))


def test_without_a_mask_the_call_itself_says_the_rule() -> None:
    assert reconcile(None, None, True, []) == AttentionRule()
    assert reconcile(None, 8, True, []) == AttentionRule(window=8)


def test_the_mask_decides_when_both_speak() -> None:
    assert reconcile(AttentionRule(window=8), 8, True, []) == AttentionRule(window=8)
    assert reconcile(AttentionRule(window=8), None, True, []) == AttentionRule(window=8)
    assert reconcile(AttentionRule(chunk=16), None, True, []) == AttentionRule(chunk=16)
    assert reconcile(AttentionRule(), 8, True, []) == AttentionRule()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((None, None, False, []), "attention is bidirectional (no mask, module.is_causal is False)"),
        ((AttentionRule(window=8), 16, True, []), "the mask has sliding window 8, the attention call 16"),
        ((AttentionRule(unsupported="bidirectional mask"), None, True, []), "bidirectional mask"),
        ((None, None, True, ["position_bias"]), "the attention call has arguments of unknown meaning: position_bias"),
    ],
)
def test_what_attention_cannot_express_is_refused_with_its_reason(arguments: Any, reason: str) -> None:
    assert reconcile(*arguments).unsupported == reason


def test_mask_functions_give_rules_within_the_context_and_masks_again_after_it() -> None:
    register_interfaces()
    model = build_meta_model(tiny_config("gemma3_text"), torch.float32)
    original = masking_utils.create_causal_mask
    table = dict(masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING)
    config = SimpleNamespace(sliding_window=8, attention_chunk_size=16, is_causal=True)
    with recorded_masks(model):
        assert decode_rule(masking_utils.create_causal_mask(config)) == AttentionRule()
        assert decode_rule(masking_utils.create_sliding_window_causal_mask(config=config)) == AttentionRule(window=8)
        assert decode_rule(masking_utils.create_chunked_causal_mask(config)) == AttentionRule(chunk=16)
        overlay = decode_rule(masking_utils.create_causal_mask(config, or_mask_function=lambda: None))
        assert overlay is not None and overlay.unsupported == "mask with or_mask_function"
        bidirectional = decode_rule(masking_utils.create_bidirectional_mask(config))
        assert bidirectional is not None and bidirectional.unsupported == "bidirectional mask"
        config.is_causal = False
        not_causal = decode_rule(masking_utils.create_causal_mask(config))
        assert not_causal is not None and "config.is_causal is False" in not_causal.unsupported
    assert masking_utils.create_causal_mask is original
    assert table == masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma3_text", {"sliding_attention": (8, 0, 0.0), "full_attention": (0, 0, 0.0)}),
        ("llama4_text", {"chunked_attention": (0, 16, 0.0), "full_attention": (0, 0, 0.0)}),
        ("gemma2", {"sliding_attention": (8, 0, 50.0), "full_attention": (0, 0, 50.0)}),
        ("qwen2_moe", {"sliding_attention": (8, 0, 0.0), "full_attention": (0, 0, 0.0)}),
    ],
)
def test_window_chunk_and_softcap_follow_the_layer_type(name: str, expected: dict[str, tuple[int, int, float]]) -> None:
    config = tiny_config(name)
    launches = [x for x in compiled(config).plan.launches if x.op == "gs.paged_attention.default"]
    found = {kind: x.args[9:12] for kind, x in zip(config.layer_types, launches, strict=True)}
    assert found == {kind: rule for kind, rule in expected.items() if kind in config.layer_types}
    assert all(x.args[12] is True for x in launches)


def test_an_encoder_is_refused_as_bidirectional() -> None:
    config = tiny_config("bert")
    config.is_decoder = False
    with pytest.raises(UnsupportedModelError, match="bidirectional"):
        compiled(config)
