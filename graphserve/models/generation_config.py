"""Defaults that a checkpoint's authors ask for: ``generation_config.json``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec

from graphserve.errors import ConfigError

logger = logging.getLogger(__name__)

# generation_config.json key -> sampling parameter. `do_sample` is deliberately not here: it selects between sampling
# and greedy search in transformers' generate(), while a served request states its temperature.
SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


class GenerationDefaults(msgspec.Struct, frozen=True):
    """What requests inherit from the checkpoint when they do not say otherwise.

    ``eos_token_ids`` (sorted, no duplicates) end a sequence unless the request ignores them. ``sampling`` holds only
    the sampling parameters that the file states, under their SamplingParams names.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = msgspec.field(default_factory=dict)


def load_generation_defaults(
    model_dir: str | Path,
    config_eos_token_id: int | list[int] | None = None,
    tokenizer_eos_token_id: int | None = None,
    generation_config: str = "auto",
) -> GenerationDefaults:
    """Read ``generation_config.json`` beside the checkpoint.

    Args:
        model_dir: the model's folder.
        config_eos_token_id: ``eos_token_id`` of config.json.
        tokenizer_eos_token_id: the tokenizer's own end token.
        generation_config: ``"auto"`` (the model's folder), ``"vllm"`` (engine defaults: no sampling values are taken,
            end tokens still are), or another folder with a generation_config.json.

    Raises:
        ConfigError: the file, or a value in it, is malformed; a named folder has no such file.
    """
    folder = Path(model_dir) if generation_config in ("auto", "vllm") else Path(generation_config)
    path = folder / "generation_config.json"
    if not path.is_file() and generation_config not in ("auto", "vllm"):
        raise ConfigError(
            f"generation_config={generation_config!r}: {path} does not exist; allowed: 'auto', 'vllm', or a folder "
            "with generation_config.json"
        )
    raw = _read(path) if path.is_file() else {}
    eos = {
        *_token_ids(raw.get("eos_token_id"), path),
        *_token_ids(config_eos_token_id, Path(model_dir) / "config.json"),
        *_token_ids(tokenizer_eos_token_id, Path(model_dir) / "tokenizer_config.json"),
    }
    sampling: dict[str, Any] = {}
    if generation_config != "vllm":
        for key, name in SAMPLING_KEYS.items():
            value = raw.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{path}: {key} must be a number, found {value!r}")
            sampling[name] = value
    if sampling:
        logger.info("sampling defaults from %s: %s", path.name, sampling)
    return GenerationDefaults(eos_token_ids=tuple(sorted(eos)), sampling=sampling)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _token_ids(value: Any, path: Path) -> list[int]:
    """One id, a list of ids, or None, as a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise ConfigError(f"{path}: eos_token_id must be an int or a list of ints, found {value!r}")
    # Some published files use -1 for "none".
    return [token for token in ids if token >= 0]
