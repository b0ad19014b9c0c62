"""What the generic shrinking of `tests/tiny_models.py` cannot know: per-architecture overrides and rope variants.

A *name* is a `model_type` of `transformers`, or `model_type:variant` for one of :data:`VARIANTS`.
"""

from __future__ import annotations

from typing import Any

# The architectures that must be right (not merely refused) for a release.
NAMED: tuple[str, ...] = (
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "phi3:longrope",
    "phi3:longrope_short",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "opt",
    "olmo2",
    "olmoe",
    "granite",
    "granitemoe",
    "cohere",
    "cohere2",
    "starcoder2",
    "stablelm",
    "smollm3",
    "deepseek_v3",
    "glm4",
    "glm4_moe",
    "nemotron",
    "exaone4",
    "ernie4_5",
    "minimax_m2",
    "seed_oss",
)

# Right, or refused with a reason: nothing else.
NAMED_RIGHT_OR_REFUSED: tuple[str, ...] = ("gemma3n_text", "gemma4_text")

_ROTARY_PAIRS = 8  # head_dim 16 of the tiny models

# Rope forms that a default config does not show. `original_max_position_embeddings` decides which longrope table is
# used: 4 makes every request of the job long, 128 (the job's max_model_len) makes every request short.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama:linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama:llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama:yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama:dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "phi3:longrope": {
        "original_max_position_embeddings": 4,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * i for i in range(_ROTARY_PAIRS)],
            "long_factor": [1.5 + 0.5 * i for i in range(_ROTARY_PAIRS)],
            "original_max_position_embeddings": 4,
        },
    },
    "phi3:longrope_short": {
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * i for i in range(_ROTARY_PAIRS)],
            "long_factor": [1.5 + 0.5 * i for i in range(_ROTARY_PAIRS)],
            "original_max_position_embeddings": 128,
        },
    },
    "phi3:full": {"sliding_window": None},
    "mistral:full": {"sliding_window": None},
    "opt:post_norm": {"do_layer_norm_before": False},
    "falcon:alibi": {"alibi": True},
    "stablelm:parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "gpt_neox:serial": {"use_parallel_residual": False},
    "mixtral:full": {"sliding_window": None},
    "qwen3_moe:full": {"sliding_window": None, "use_sliding_window": False},
    "starcoder2:full": {"sliding_window": None},
    "gemma4_text:shared": {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2},
    "gemma4_text:moe": {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 48},
    "gemma4_text:k_eq_v": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
}

# Overrides by model_type, applied last. Nested dicts are for sub-configs. They show layer types that the default config
# does not have, or repair sizes that the class derives from others.
_SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": {"sliding_attention": _DEFAULT_ROPE, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 2.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 6, "moe_top_k": 2},
        "rope_parameters": _DEFAULT_ROPE,
    },
    "deepseek_v3": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "layer_types": _SLIDING_AND_FULL,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _SLIDING_AND_FULL},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    # floor_scale 16: the temperature of the layers without rope changes within the job's 102 positions
    "llama4_text": {
        "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"],
        "interleave_moe_layer_step": 2,
        "floor_scale": 16,
    },
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": _SLIDING_AND_FULL},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "reformer": {"axial_pos_shape": (16, 16), "axial_pos_embds_dim": (32, 32), "attn_layers": ["local", "lsh"] * 2},
    "xlnet": {"attn_type": "uni"},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}
