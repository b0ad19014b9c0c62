"""Flags made from struct fields."""

from __future__ import annotations

import argparse
from typing import Any, Literal

import msgspec
import pytest

from graphserve.cli.engine_options import add_local_options, engine_config, sampling_params
from graphserve.cli.struct_options import add_struct_options, attribute_help, given_options
from graphserve.config import EngineConfig


class Options(msgspec.Struct):
    """Options.

    Attributes:
        size: how large,
            in ``tokens``.
        is_fast: whether it is fast.
        mode: which way.
        names: what it is called.
        extra: anything else.

    Raises:
        Nothing: at all.
    """

    size: int | None = None
    is_fast: bool = True
    mode: Literal["a", "b"] = "a"
    names: list[str] = []
    extra: dict[str, Any] = {}


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_struct_options(parser, Options)
    parser.add_argument("model", nargs="?")
    return parser.parse_args(arguments)


def test_flags_have_the_types_of_their_fields() -> None:
    arguments = ["--size", "3", "--no-is-fast", "--mode", "b", "--names", "x", "--names", "y", "--extra", '{"k": [1]}']
    assert given_options(parse(*arguments), Options) == {
        "size": 3,
        "is_fast": False,
        "mode": "b",
        "names": ["x", "y"],
        "extra": {"k": [1]},
    }


def test_a_flag_that_is_not_given_leaves_no_trace() -> None:
    assert given_options(parse(), Options) == {}


def test_a_list_flag_does_not_swallow_the_positional_behind_it() -> None:
    options = parse("--names", "x", "demo")
    assert options.model == "demo" and options.names == ["x"]


@pytest.mark.parametrize("arguments", [["--size", "x"], ["--mode", "c"], ["--extra", "[]"], ["--extra", "{"]])
def test_a_wrong_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        parse(*arguments)


def test_help_is_the_attributes_section() -> None:
    assert attribute_help(Options) == {
        "size": "how large, in tokens",
        "is_fast": "whether it is fast",
        "mode": "which way",
        "names": "what it is called",
        "extra": "anything else",
    }


def test_every_engine_option_is_described_and_reaches_the_config() -> None:
    assert set(attribute_help(EngineConfig)) == set(EngineConfig.__struct_fields__)
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    add_local_options(parser)
    options = parser.parse_args(["demo", "--seed", "7", "--max-model-len", "64", "--no-enable-chunked-prefill"])
    config = engine_config(options)
    assert (config.model, config.seed, config.max_model_len, config.enable_chunked_prefill) == ("demo", 7, 64, False)
    assert sampling_params(options, {"top_p": 0.5}).seed == 7


def test_flags_go_over_the_models_defaults_and_without_either_the_answer_repeats() -> None:
    parser = argparse.ArgumentParser()
    add_local_options(parser)
    assert sampling_params(parser.parse_args([]), {}).temperature == 0.0
    assert sampling_params(parser.parse_args([]), {"temperature": 0.7}).temperature == 0.7
    assert sampling_params(parser.parse_args(["--temperature", "1.5"]), {"temperature": 0.7}).temperature == 1.5
