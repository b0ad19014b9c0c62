"""Defaults that a checkpoint's authors ask for: ``generation_config.json``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from graphserve.errors import ConfigError, RequestError
from graphserve.sampling_params import SamplingParams

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

_FILE_NAME = "generation_config.json"
_KEYWORDS = ("auto", "vllm")  # anything else names a folder


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
    path = _file(generation_config, model_dir)
    stated = _read(path, generation_config)
    eos = {
        *stated.eos_token_ids,
        *_token_ids(config_eos_token_id, Path(model_dir) / "config.json"),
        *_token_ids(tokenizer_eos_token_id, Path(model_dir) / "tokenizer_config.json"),
    }
    if stated.sampling:
        logger.info("sampling defaults from %s: %s", path.name, stated.sampling)
    return GenerationDefaults(eos_token_ids=tuple(sorted(eos)), sampling=stated.sampling)


def override(defaults: GenerationDefaults, changes: Mapping[str, Any]) -> GenerationDefaults:
    """The defaults with some values replaced.

    Args:
        changes: ``override_generation_config``: values under the names of generation_config.json.

    Raises:
        ConfigError: a name is unknown, or an end token is no int.
    """
    sampling, eos = dict(defaults.sampling), defaults.eos_token_ids
    for key, value in changes.items():
        if key == "eos_token_id":
            eos = tuple(sorted(_token_ids(value, "override_generation_config")))
        elif key in SAMPLING_KEYS:
            sampling[SAMPLING_KEYS[key]] = value
        else:
            allowed = ", ".join(["eos_token_id", *SAMPLING_KEYS])
            raise ConfigError(f"override_generation_config has {key}={value!r}: allowed are {allowed}")
    return GenerationDefaults(eos, sampling)


def check_generation_options(
    generation_config: str, changes: Mapping[str, Any], model_dir: str | Path | None = None
) -> None:
    """Refuse early what :func:`load_generation_defaults` and :func:`override` refuse, and unusable sampling defaults.

    Args:
        generation_config: as for :func:`load_generation_defaults`.
        changes: as for :func:`override`.
        model_dir: None while the model is not at hand; its own file is not looked at then.

    Raises:
        ConfigError: says which value, and what is allowed.
    """
    source, stated = "override_generation_config", GenerationDefaults()
    if generation_config not in _KEYWORDS or model_dir is not None:
        path = _file(generation_config, model_dir or "")
        source, stated = f"{path} and {source}", _read(path, generation_config)
    try:
        SamplingParams(**override(stated, changes).sampling)
    except RequestError as error:
        raise ConfigError(
            f"the sampling defaults of {source} cannot be used: {error} (override_generation_config replaces a value)"
        ) from None


def _file(generation_config: str, model_dir: str | Path) -> Path:
    """The file that ``generation_config`` means. The model's own need not exist."""
    if generation_config in _KEYWORDS:
        return Path(model_dir) / _FILE_NAME
    path = Path(generation_config).expanduser() / _FILE_NAME
    if not path.is_file():
        raise ConfigError(
            f"generation_config={generation_config!r}: {path} does not exist; allowed: 'auto', 'vllm', or a folder "
            f"with {_FILE_NAME}"
        )
    return path


def _read(path: Path, generation_config: str) -> GenerationDefaults:
    """What a file states, as far as it is taken; nothing if there is none."""
    if not path.is_file():
        return GenerationDefaults()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    taken = {} if generation_config == "vllm" else SAMPLING_KEYS
    sampling = {name: _number(raw[key], key, path) for key, name in taken.items() if raw.get(key) is not None}
    return GenerationDefaults(tuple(_token_ids(raw.get("eos_token_id"), path)), sampling)


def _number(value: Any, key: str, path: Path) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{path}: {key} must be a number, found {value!r}")
    return value


def _token_ids(value: Any, source: Path | str) -> list[int]:
    """One id, a list of ids, or None, as a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise ConfigError(f"{source}: eos_token_id must be an int or a list of ints, found {value!r}")
    # Some published files use -1 for "none".
    return [token for token in ids if token >= 0]
