"""Tiny random models of any causal-LM architecture of the installed `transformers`, and their true logits.

A tiny config is the architecture's default config with every size replaced by a small one (:data:`SIZES`), every layer
type present and at least four layers. The weights are random in a way that makes errors visible: matrices of standard
deviation 0.2, norm weights, biases, sinks and correction buffers moved off their initial values.
"""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.coverage_configs import OVERRIDES, VARIANTS

VOCAB = 200
WINDOW = 8
CHUNK = 16
MIN_LAYERS = 4
FIRST_TEXT_TOKEN, LAST_TEXT_TOKEN = 10, 180  # no special token lies in this range
WEIGHT_STD = 0.2

_HIDDEN = 64
_HEADS = 4
_KV_HEADS = 2
_HEAD_DIM = 16
_EXPERTS = 6
_POSITIONS = 256

# Config field -> tiny value. Sizes that differ in a real model differ here too, so that a mix-up changes a shape.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size"), _HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "backbone_hidden_size"), _HIDDEN),
    **dict.fromkeys(("attention_hidden_size", "lru_width"), _HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), _HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), _KV_HEADS),
    "num_global_key_value_heads": 1,
    **dict.fromkeys(("head_dim", "kv_channels", "swa_head_dim", "attention_head_size", "d_head", "d_kv"), _HEAD_DIM),
    **dict.fromkeys(("attention_head_dim", "linear_head_dim"), _HEAD_DIM),
    "global_head_dim": 32,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "d_inner", "feed_forward_size"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "block_ffn_dim", "dim_ff"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size"), 112),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 80),
    "moe_shared_expert_intermediate_size": 80,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "zero_expert_num": 2,
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group"), 1),
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), WINDOW),
    "local_attention": 2 * WINDOW,  # modernbert counts both sides
    "use_sliding_window": True,
    "max_window_layers": 2,
    "attention_chunk_size": CHUNK,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length"), _POSITIONS),
    **dict.fromkeys(("context_length", "max_target_positions", "max_source_positions"), _POSITIONS),
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 4),
    **dict.fromkeys(("index_head_dim", "indexer_head_dim"), 16),
    "index_topk": 32,
    "is_decoder": True,
    "laurel_rank": 8,
    "adapter_rank": 8,
    "router_hidden_size": 32,
    "router_dtype": "float32",
    "type_vocab_size": 2,
}
# These are set although the default is None; elsewhere None means that the model goes without.
_SET_WHEN_NONE = ("num_key_value_heads", "num_kv_heads", "head_dim", "sliding_window")
_DEPTHS: tuple[str, ...] = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_DEPTHS += ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers")
_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FIRST_EXTRA_TOKEN = LAST_TEXT_TOKEN + 2


def architectures() -> list[str]:
    """Every `model_type` with a causal-LM class, followed by the rope and norm variants."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def tiny_config(name: str) -> PretrainedConfig:
    """The tiny config of an architecture.

    Args:
        name: a `model_type`, or `model_type:variant` of `benchmarks.coverage_configs.VARIANTS`.

    Raises:
        KeyError: the installed `transformers` has no such `model_type`.
    """
    model_type = name.partition(":")[0]
    config_class = CONFIG_MAPPING[model_type]
    overrides = {**OVERRIDES.get(model_type, {}), **VARIANTS.get(name, {})}
    config = _shrink(config_class, overrides)
    _set_implementations(config)
    return config


def _shrink(config_class: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    fields = _default_fields(config_class)
    kwargs: dict[str, Any] = {}
    extra_tokens = iter(range(_FIRST_EXTRA_TOKEN, VOCAB))
    layer_lists = {field: _covering_layers(fields[field]) for field in _LAYER_LISTS if fields.get(field)}
    layer_lists.update({field: overrides[field] for field in _LAYER_LISTS if field in overrides})
    depth = max([MIN_LAYERS, *(len(layers) for layers in layer_lists.values())])
    for field, layers in layer_lists.items():
        kwargs[field] = _extend(layers, depth, cycle=field in ("layer_types", "layers_block_type"))
    for field, value in fields.items():
        if field in _DEPTHS:
            kwargs[field] = depth
        elif field in SIZES and (value is not None or field in _SET_WHEN_NONE):
            kwargs[field] = SIZES[field]
        elif field in _TOKEN_IDS and value is not None:
            kwargs[field] = _TOKEN_IDS[field]
        elif field.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            kwargs[field] = next(extra_tokens)
    if "qk_rope_head_dim" in fields:  # latent attention: as many KV heads as heads, head_dim is the rotary part
        kwargs.pop("head_dim", None)
        kwargs["num_key_value_heads"] = _HEADS
    for field in config_class.sub_configs:
        part = fields.get(field)
        if isinstance(part, PretrainedConfig):
            kwargs[field] = _shrink(type(part), overrides.get(field, {}))
    kwargs.update({field: value for field, value in overrides.items() if field not in config_class.sub_configs})
    return config_class(**kwargs)


def _default_fields(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Fields of the default config, with sliding layers switched on where that is an option."""
    parameters = inspect.signature(config_class).parameters
    sliding: dict[str, Any] = {}
    if "use_sliding_window" in parameters:
        sliding = {"use_sliding_window": True, "sliding_window": WINDOW}
    try:
        return dict(vars(config_class(**sliding)))
    except (ValueError, TypeError):  # defaults that contradict one another: the signature still names the fields
        return {p.name: None if p.default is p.empty else p.default for p in parameters.values()}


def _covering_layers(layers: list[str]) -> list[str]:
    """The distinct layer types in order of first appearance."""
    return list(dict.fromkeys(layers))


def _extend(layers: list[str], depth: int, cycle: bool) -> list[str]:
    """`layers` made `depth` long: by repetition of the whole, or of its last entry."""
    if cycle:
        return [layers[i % len(layers)] for i in range(depth)]
    return layers + [layers[-1]] * (depth - len(layers))


def _set_implementations(config: PretrainedConfig) -> None:
    for part in (config, *(getattr(config, field, None) for field in config.sub_configs)):
        if part is not None:
            part._attn_implementation = "eager"
            part._experts_implementation = "eager"


def tiny_model(config: PretrainedConfig, seed: int = 0) -> nn.Module:
    """A randomised fp32 model on the CPU in eval mode, eager attention.

    Raises:
        whatever the class of `transformers` raises when it cannot be built.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise_(model, seed)
    return model.float().eval()


@torch.no_grad()
def randomise_(model: nn.Module, seed: int) -> None:
    """Replaces every parameter and persistent float buffer in place; the same names and seed give the same values."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in checkpoint_tensors(model, remove_duplicate=True).items():
        is_table = name not in parameters and _constant_level(tensor) is None
        if is_table or not tensor.is_floating_point():
            continue  # a table computed from the config (decay slopes, position codes) keeps its values
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        noise = torch.randn(tensor.shape, generator=generator) * WEIGHT_STD
        tensor.copy_(noise if tensor.dim() > 1 else (_constant_level(tensor) or 0.0) + noise)


def _constant_level(tensor: torch.Tensor) -> float | None:
    """0 or 1 when every element is that (1 for most norm weights, 0 for Gemma's and for biases), else None."""
    return next((level for level in (0.0, 1.0) if bool((tensor == level).all())), None)


def checkpoint_tensors(model: nn.Module, remove_duplicate: bool = False) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by the model's own names (ties under every name unless `remove_duplicate`)."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=remove_duplicate))
    persistent = set(model.state_dict().keys())
    buffers = dict(model.named_buffers(remove_duplicate=remove_duplicate))
    tensors.update({name: buffer for name, buffer in buffers.items() if name in persistent})
    return {name: tensor.detach() for name, tensor in tensors.items()}


@torch.no_grad()
def hf_logits(model: nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Logits `[T, vocab]` fp32 of one request alone, one full forward without a cache."""
    output = model(input_ids=torch.tensor([token_ids]), use_cache=False)
    logits = output.logits if hasattr(output, "logits") else output[0]
    return logits[0].float()


def text_tokens(length: int, seed: int) -> list[int]:
    """`length` token ids that are never special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TEXT_TOKEN, LAST_TEXT_TOKEN, (length,), generator=generator).tolist()
