"""config.json: what is refused and why, dtypes, the text part of multimodal configs, the longest context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from graphserve.errors import ConfigError, UnsupportedModelError
from graphserve.models.config import derive_max_model_len, load_config, resolve_dtype


def folder_with(path: Path, config: Any) -> Path:
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


REFUSED = {
    "not json": ("{", ConfigError, "is not JSON"),
    "not an object": ([1], ConfigError, "expected a JSON object, found list"),
    "no model type": ({}, ConfigError, "has no model_type"),
    "unknown type": ({"model_type": "made_up"}, ConfigError, "'made_up' is unknown to the installed transformers"),
    "remote code": (
        {"model_type": "made_up", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        ConfigError,
        r"\(auto_map\), which is never run.*Upgrade transformers",
    ),
    "quantized": (
        {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
        UnsupportedModelError,
        "quantized with 'gptq'.*use the unquantized checkpoint",
    ),
    "quantized text part": (
        {"model_type": "gemma3", "text_config": {"quantization_config": {"quant_method": "awq"}}},
        UnsupportedModelError,
        "quantized with 'awq'",
    ),
    "encoder-decoder": ({"model_type": "t5"}, UnsupportedModelError, "'t5' is an encoder-decoder"),
    "no language model": ({"model_type": "vit"}, UnsupportedModelError, "'vit'.*no causal language model class"),
    "invalid value": ({"model_type": "llama", "hidden_size": "wide"}, ConfigError, "not a valid llama configuration"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    config, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        load_config(folder_with(tmp_path, config))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_config(tmp_path)


def test_a_known_type_is_loaded_although_the_checkpoint_brings_code(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text("raise RuntimeError('code of the checkpoint was run')")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    config = load_config(folder_with(tmp_path, {"model_type": "llama", "auto_map": auto_map}))
    assert type(config) is LlamaConfig and not hasattr(config, "auto_map")


@pytest.mark.parametrize(
    ("model_type", "text_type"), [("gemma3", "gemma3_text"), ("llama4", "llama4_text"), ("mistral3", "mistral")]
)
def test_a_multimodal_config_gives_its_text_part(model_type: str, text_type: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type).to_dict()
    config |= {"tie_word_embeddings": True, "dtype": "bfloat16"}
    text = load_config(folder_with(tmp_path, config))
    assert text.model_type == text_type
    assert text.tie_word_embeddings is True and resolve_dtype("auto", text) == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float32", torch.float32),
        ("float", torch.float32),
        ("half", torch.float16),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_dtype_names_are_those_of_other_servers(name: str | torch.dtype, expected: torch.dtype) -> None:
    assert resolve_dtype(name, LlamaConfig()) == expected


@pytest.mark.parametrize("name", ["fp16", "int8", "", torch.int8, torch.float64])
def test_any_other_dtype_is_refused_with_those_allowed(name: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match="allowed are 'auto', 'float32', 'float', 'float16', 'half', 'bfloat16'"):
        resolve_dtype(name, LlamaConfig())


def test_auto_takes_the_config_then_the_stored_dtype_then_float32() -> None:
    assert resolve_dtype("auto", LlamaConfig(dtype="bfloat16"), torch.float16) == torch.bfloat16
    assert resolve_dtype("auto", LlamaConfig(), torch.float16) == torch.float16
    assert resolve_dtype("auto", LlamaConfig()) == torch.float32
    assert resolve_dtype("auto", LlamaConfig(dtype="float64")) == torch.float32


def rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **values}


LENGTHS = {
    "plain": (LlamaConfig(max_position_embeddings=4096), 4096),
    "linear": (LlamaConfig(max_position_embeddings=4096, rope_parameters=rope("linear", factor=2.0)), 8192),
    "dynamic": (LlamaConfig(max_position_embeddings=2048, rope_parameters=rope("dynamic", factor=4.0)), 8192),
    "yarn, trained length stated": (
        LlamaConfig(
            max_position_embeddings=32768,
            rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32768),
        ),
        131072,
    ),
    "yarn, stretched length stated": (
        LlamaConfig(
            max_position_embeddings=163840,
            rope_parameters=rope("yarn", factor=40.0, original_max_position_embeddings=4096),
        ),
        163840,
    ),
    "llama3": (
        LlamaConfig(
            max_position_embeddings=131072,
            rope_parameters=rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
        131072,
    ),
    "gpt2": (AutoConfig.for_model("gpt2", n_positions=1024), 1024),
    "mpt": (AutoConfig.for_model("mpt", max_seq_len=2048), 2048),
    "two RoPE sets": (AutoConfig.for_model("gemma3_text", max_position_embeddings=32768), 32768),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_the_longest_context_follows_the_config(case: str) -> None:
    config, expected = LENGTHS[case]
    assert derive_max_model_len(config) == expected
    assert derive_max_model_len(config, expected) == expected
    assert derive_max_model_len(config, 17) == 17
    with pytest.raises(ConfigError, match=rf"max_model_len={expected + 1} is larger than the {expected} tokens"):
        derive_max_model_len(config, expected + 1)


def test_longrope_is_served_at_its_trained_length_unless_more_is_requested(caplog: pytest.LogCaptureFixture) -> None:
    factors = {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 4096}
    config = LlamaConfig(max_position_embeddings=131072, rope_parameters=rope("longrope", **factors))
    assert derive_max_model_len(config) == 4096
    assert "up to 131072 can be requested" in caplog.text
    assert derive_max_model_len(config, 131072) == 131072
    with pytest.raises(ConfigError, match="larger than the 131072 tokens"):
        derive_max_model_len(config, 131073)


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len=0: give tokens >= 1"):
        derive_max_model_len(LlamaConfig(), 0)


def test_a_config_that_states_no_length_gets_the_default_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = AutoConfig.for_model("bloom")
    assert derive_max_model_len(config) == 2048
    assert derive_max_model_len(config, 5000) == 5000
    assert "config states none of" in caplog.text
