"""generation_config.json: end tokens from three places, sampling defaults, malformed files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graphserve.errors import ConfigError
from graphserve.models.generation_config import (
    GenerationDefaults,
    check_generation_options,
    load_generation_defaults,
    override,
)


def folder_with(path: Path, config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_end_tokens_are_the_union_of_the_three_places(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"eos_token_id": [128001, 128009]})
    assert load_generation_defaults(folder, 128001, 128008).eos_token_ids == (128001, 128008, 128009)
    assert load_generation_defaults(folder, [1, 2]).eos_token_ids == (1, 2, 128001, 128009)
    assert load_generation_defaults(folder_with(tmp_path, {"eos_token_id": 0}), None, None).eos_token_ids == (0,)
    assert load_generation_defaults(folder_with(tmp_path, {"eos_token_id": -1}), None, 7).eos_token_ids == (7,)


def test_without_the_file_only_end_tokens_are_known(tmp_path: Path) -> None:
    assert load_generation_defaults(tmp_path, 2, 3) == GenerationDefaults(eos_token_ids=(2, 3))


def test_stated_sampling_values_become_defaults_under_our_names(tmp_path: Path) -> None:
    config = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.05,
        "max_new_tokens": 512,
        "do_sample": False,
        "num_beams": 4,
        "typical_p": None,
    }
    sampling = load_generation_defaults(folder_with(tmp_path, config)).sampling
    assert sampling == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.05,
        "max_tokens": 512,
    }


def test_do_sample_false_and_nulls_change_nothing(tmp_path: Path) -> None:
    config = {"do_sample": False, "temperature": None, "top_p": None}
    assert load_generation_defaults(folder_with(tmp_path, config)).sampling == {}


def test_vllm_takes_end_tokens_but_no_sampling_values(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"eos_token_id": 5, "temperature": 0.6})
    assert load_generation_defaults(folder, generation_config="vllm") == GenerationDefaults(eos_token_ids=(5,))


def test_another_folder_may_hold_the_file(tmp_path: Path) -> None:
    model, other = folder_with(tmp_path / "model", {"top_k": 1}), folder_with(tmp_path / "other", {"top_k": 9})
    assert load_generation_defaults(model, generation_config=str(other)).sampling == {"top_k": 9}
    with pytest.raises(ConfigError, match="allowed: 'auto', 'vllm', or a folder"):
        load_generation_defaults(model, generation_config=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ([], "expected a JSON object, found list"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an int or a list of ints, found '</s>'"),
        ({"eos_token_id": [1, True]}, "eos_token_id must be an int"),
        ({"temperature": "hot"}, "temperature must be a number, found 'hot'"),
        ({"top_k": True}, "top_k must be a number, found True"),
    ],
)
def test_a_malformed_file_is_refused_with_the_key(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_generation_defaults(folder_with(tmp_path, config))


def test_vllm_is_the_way_around_a_file_with_malformed_values(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"temperature": "hot", "eos_token_id": 5})
    assert load_generation_defaults(folder, generation_config="vllm").eos_token_ids == (5,)
    check_generation_options("vllm", {}, folder)


def test_values_are_replaced_by_the_names_of_the_file() -> None:
    defaults = GenerationDefaults((7,), {"top_k": 5, "temperature": 0.7})
    changed = override(defaults, {"top_k": 9, "max_new_tokens": 3, "eos_token_id": [4, 2]})
    assert changed == GenerationDefaults((2, 4), {"top_k": 9, "temperature": 0.7, "max_tokens": 3})
    with pytest.raises(ConfigError, match="num_beams=3: allowed are eos_token_id, temperature"):
        override(defaults, {"num_beams": 3})
    with pytest.raises(ConfigError, match="override_generation_config: eos_token_id must be an int"):
        override(defaults, {"eos_token_id": "</s>"})


@pytest.mark.parametrize(
    ("generation_config", "changes", "message"),
    [
        ("auto", {"num_beams": 3}, "override_generation_config has num_beams=3"),
        ("auto", {"temperature": 9}, "override_generation_config cannot be used: temperature=9"),
        ("/no/such/folder", {}, "generation_config='/no/such/folder': .* does not exist"),
    ],
)
def test_options_are_refused_before_the_model_is_at_hand(
    generation_config: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_generation_options(generation_config, changes)


def test_a_files_unusable_value_is_refused_unless_it_is_replaced(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"top_p": 7})
    check_generation_options("auto", {})
    with pytest.raises(ConfigError, match=r"generation_config.json and override.* cannot be used: top_p=7"):
        check_generation_options("auto", {}, folder)
    check_generation_options("auto", {"top_p": 0.9}, folder)
    check_generation_options("vllm", {}, folder)
