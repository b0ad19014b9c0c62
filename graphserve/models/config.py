"""Reading a model's ``config.json``: what it is, whether it can be served, its dtype and its longest context."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphserve.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

DTYPE_NAMES = {
    "float32": "float32",
    "float": "float32",
    "float16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
}

# Names under which configs state how many positions the model was made for; the smallest one counts.
LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
DEFAULT_MAX_MODEL_LEN = 2048

# RoPE types whose max_position_embeddings already is the extended length.
ALREADY_SCALED_ROPE = frozenset({"default", "llama3", "longrope", "su", "mrope", "proportional"})


def read_config_json(model_dir: str | Path) -> dict[str, Any]:
    """Parse ``config.json`` of a folder.

    Raises:
        ConfigError: the file is missing or is not a JSON object.
    """
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{model_dir} has no config.json: give the folder of a transformers checkpoint") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def check_servable(config: dict[str, Any]) -> None:
    """Refuse, from ``config.json`` alone, what would need code from the checkpoint or a quantized format.

    Raises:
        ConfigError: the model type is missing, needs remote code, or is unknown to the installed transformers.
        UnsupportedModelError: the checkpoint is quantized.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not model_type:
        raise ConfigError("config.json has no model_type: it is not a transformers model configuration")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in config:
            raise ConfigError(
                f"model_type {model_type!r} needs Python code shipped with the checkpoint (auto_map), which is never "
                f"run; allowed: the model types of the installed transformers {transformers.__version__}. Upgrade "
                "transformers if a newer release has it natively, or use a checkpoint converted to a native type"
            )
        raise ConfigError(
            f"model_type {model_type!r} is unknown to the installed transformers {transformers.__version__}: upgrade "
            "transformers (pip install -U transformers), or use another model"
        )
    quantization = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else str(quantization)
        raise UnsupportedModelError(
            f"the checkpoint is quantized with {method!r}; only float32, float16 and bfloat16 weights can be served: "
            "use the unquantized checkpoint of this model"
        )


def load_config(model_dir: str | Path) -> PreTrainedConfig:
    """Read a folder's configuration as the config of a causal language model; no code of the checkpoint runs.

    A multimodal wrapper whose text part is a causal model of its own (Gemma 3, Llama 4, ...) gives the text config,
    with ``tie_word_embeddings`` and ``dtype`` taken over from the wrapper.

    Raises:
        ConfigError: missing or unknown configuration, or one that needs remote code.
        UnsupportedModelError: quantized, or no causal language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    raw = read_config_json(model_dir)
    check_servable(raw)
    try:
        config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        message = f"config.json of {model_dir} is not a valid {raw['model_type']} configuration: {error}"
        raise ConfigError(message) from error
    if hasattr(config, "auto_map"):
        del config.auto_map
    return causal_lm_config(config)


def causal_lm_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config itself, or its text part, as a config that a causal-LM class takes.

    Raises:
        UnsupportedModelError: neither has a causal language model class; encoder-decoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} is an encoder-decoder; allowed: decoder-only causal language models"
        )
    text = config.get_text_config(decoder=True)
    if text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        logger.info("%s is multimodal: only its text model (%s) is served", config.model_type, text.model_type)
        if getattr(config, "tie_word_embeddings", None) is not None:
            text.tie_word_embeddings = config.tie_word_embeddings
        if text.dtype is None:
            text.dtype = config.dtype
        return text
    if text is config and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    raise UnsupportedModelError(
        f"model_type {config.model_type!r} ({type(config).__name__}) has no causal language model class in "
        "transformers: give a text generation model"
    )


def resolve_dtype(
    dtype: str | torch.dtype, config: PreTrainedConfig, stored_dtype: torch.dtype | None = None
) -> torch.dtype:
    """The dtype to compute in.

    Args:
        dtype: ``"auto"`` (the config's dtype, else ``stored_dtype``, else float32) or one of ``DTYPE_NAMES``.
        config: the model config.
        stored_dtype: what most of the checkpoint's bytes are stored in (see weight_loading.stored_dtype).

    Raises:
        ConfigError: any other name.
    """
    import torch

    allowed = (torch.float32, torch.float16, torch.bfloat16)
    if isinstance(dtype, torch.dtype):
        resolved = dtype
    elif dtype == "auto":
        declared = getattr(config, "dtype", None)
        if isinstance(declared, str):
            declared = getattr(torch, declared.removeprefix("torch."), None)
        resolved = declared or stored_dtype or torch.float32
        if resolved not in allowed:
            resolved = torch.float32  # float64 configs: the next smaller dtype that kernels have
    else:
        name = DTYPE_NAMES.get(dtype)
        if name is None:
            raise ConfigError(f"dtype={dtype!r}: allowed are 'auto', {', '.join(map(repr, DTYPE_NAMES))}")
        resolved = getattr(torch, name)
    if resolved not in allowed:
        raise ConfigError(f"dtype={dtype!r}: allowed are 'auto', {', '.join(map(repr, DTYPE_NAMES))}")
    return resolved


def derive_max_model_len(config: PreTrainedConfig, requested: int | None = None) -> int:
    """The longest sequence (prompt + output, tokens) to serve.

    ``None`` takes what the config was made for; RoPE scaling that stretches a shorter trained length (linear, dynamic,
    yarn) multiplies it by its factor. A LongRoPE model is served at its trained length unless more is requested:
    beyond it all requests get the long factors (see rope.bake_rope), which makes answers to short ones worse.

    Raises:
        ConfigError: ``requested`` is below 1 or above what the config allows.
    """
    lengths = {key: getattr(config, key, None) for key in LENGTH_KEYS}
    stated = {key: value for key, value in lengths.items() if isinstance(value, int) and value > 0}
    if requested is not None and requested < 1:
        raise ConfigError(f"max_model_len={requested}: give tokens >= 1, or None for the model's own length")
    if not stated:
        length = requested or DEFAULT_MAX_MODEL_LEN
        logger.warning("config states none of %s: max_model_len is %d", ", ".join(LENGTH_KEYS), length)
        return length
    key, limit = min(stated.items(), key=lambda item: item[1])
    limit, reason = _scaled_limit(config, limit, f"{key}={limit}")
    if requested is None:
        return _longrope_trained_length(config, limit)
    if requested > limit:
        raise ConfigError(
            f"max_model_len={requested} is larger than the {limit} tokens this model allows ({reason}): lower "
            "max_model_len"
        )
    return requested


def _longrope_trained_length(config: PreTrainedConfig, limit: int) -> int:
    for rope in rope_parameter_sets(config):
        trained = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and trained and trained < limit:
            logger.warning(
                "max_model_len is %d, the length this LongRoPE model was trained for; up to %d can be requested, with "
                "the long RoPE factors for every request",
                trained,
                limit,
            )
            return int(trained)
    return limit


def rope_parameter_sets(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The RoPE parameters of a config: one dict, or one for each layer type that has its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if not parameters:
        return []
    if all(isinstance(value, dict) for value in parameters.values()):
        return list(parameters.values())
    return [parameters]


def _scaled_limit(config: PreTrainedConfig, limit: int, reason: str) -> tuple[int, str]:
    """Apply RoPE scaling to the stated length; with several RoPE sets the least stretched one decides."""
    results: list[tuple[int, str]] = []
    for rope in rope_parameter_sets(config):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        factor = rope.get("factor")
        original = rope.get("original_max_position_embeddings")
        if rope_type in ALREADY_SCALED_ROPE or not factor:
            results.append((limit, reason))
        elif rope_type == "yarn" and original:
            # Published yarn configs state either the trained or the stretched length in max_position_embeddings.
            results.append((math.floor(original * factor), f"yarn: {original} x {factor}"))
        elif rope_type in ("linear", "dynamic") and rope.get("alpha") is None:
            results.append((math.floor(limit * factor), f"{reason}, {rope_type} RoPE factor {factor}"))
        else:
            results.append((limit, reason))
    if not results:
        return limit, reason
    # A stated length is never shortened by a RoPE set: gemma3 scales only its global layers.
    return max(min(results), (limit, reason))
