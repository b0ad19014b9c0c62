"""Meta models: no memory, the right dtypes and ties, and true values for the buffers that no checkpoint holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from graphserve.errors import UnsupportedModelError
from graphserve.models.meta_model import build_meta_model, non_persistent_buffers
from tests.tiny_models import tiny_config, tiny_model

# One of each way to compute a buffer: plain, two RoPE sets, scaled RoPE, latent attention, partial and interleaved
# rotation, embedding scales, causal masks stored as bool, sinusoidal and ALiBi positions, decay slopes.
BUFFERS = [
    "llama",
    "llama:llama3",
    "llama:yarn",
    "llama:linear",
    "llama:dynamic",
    "phi3:longrope",
    "gemma",
    "gemma3_text",
    "deepseek_v3",
    "gpt_neox",
    "gptj",
    "opt",
    "gpt2",
    "gpt_neo",
    "gpt_bigcode",
    "codegen",
    "bloom",
    "falcon",
    "xglm",
    "llama4_text",
    "cohere2",
    "phimoe",
    "olmo3",
    "smollm3",
]


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_equal_those_of_a_model_built_on_cpu(name: str) -> None:
    config = tiny_config(name)
    expected = dict(tiny_model(config).named_non_persistent_buffers())
    model = build_meta_model(config, torch.float32, "eager", "eager")
    found = non_persistent_buffers(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    assert all(buffer.device.type == "meta" for buffer in model.buffers())


def test_asking_twice_gives_the_same_values() -> None:
    model = build_meta_model(tiny_config("gemma3_text"), torch.bfloat16, "eager", "eager")
    first, second = non_persistent_buffers(model), non_persistent_buffers(model)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_buffer_that_nothing_computes_is_refused_by_name() -> None:
    model = build_meta_model(tiny_config("llama"), torch.float32, "eager", "eager")
    model.model.layers[1].register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.table"):
        non_persistent_buffers(model)


def test_a_meta_model_has_no_memory_is_frozen_and_leaves_the_config_alone() -> None:
    config = tiny_config("mixtral")
    before = config.to_dict()
    model = build_meta_model(config, torch.bfloat16, "eager", "eager")
    assert config.to_dict() == before
    assert not model.training
    for parameter in model.parameters():
        assert parameter.device.type == "meta" and parameter.dtype == torch.bfloat16 and not parameter.requires_grad


def test_tied_embeddings_are_one_parameter() -> None:
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    model = build_meta_model(config, torch.float16, "eager", "eager")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parameters_that_the_class_insists_on_are_float32() -> None:
    model = build_meta_model(tiny_config("deepseek_v3"), torch.bfloat16, "eager", "eager")
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = [name for name, dtype in dtypes.items() if dtype == torch.float32]
    assert kept and all(name.endswith("e_score_correction_bias") for name in kept)


def test_an_unknown_attention_implementation_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="attn_implementation='no_such_attention'"):
        build_meta_model(tiny_config("llama"), torch.float32, "no_such_attention", "eager")


@pytest.mark.parametrize("name", ["gptj", "falcon", "gpt_neo"])
def test_attention_outside_the_interface_is_refused_by_name(name: str) -> None:
    AttentionInterface.register("test_attention", lambda *args, **kwargs: None)
    with pytest.raises(UnsupportedModelError, match=f"{name}: its attention does not go through"):
        build_meta_model(tiny_config(name), torch.float32, "test_attention", "eager")


def test_the_size_of_a_published_model_costs_no_memory() -> None:
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8192, 28672, 80
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 64, 8, 128
    config.vocab_size = 128256
    model: nn.Module = build_meta_model(config, torch.bfloat16, "eager", "eager")
    assert sum(parameter.numel() for parameter in model.parameters()) > 65e9
