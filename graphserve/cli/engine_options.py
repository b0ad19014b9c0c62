"""Flags of :class:`EngineConfig` and :class:`SamplingParams`, shared by the commands."""

from __future__ import annotations

import argparse
from typing import Any

from graphserve import progress
from graphserve.cli.struct_options import add_struct_options, given_options
from graphserve.config import EngineConfig
from graphserve.sampling_params import SamplingParams

SAMPLING_NAMES = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


_SERVER_ONLY = ("served_model_name", "disable_log_stats", "skip_tokenizer_init")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """The positional MODEL."""
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help="folder, hub id or demo (default)")


def add_engine_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """One flag for each engine option (MODEL is positional, and code from a checkpoint is never run)."""
    group = parser.add_argument_group("engine options", "names and meanings are vLLM's")
    left_out = {"model", "trust_remote_code", *without}
    add_struct_options(group, EngineConfig, [name for name in EngineConfig.__struct_fields__ if name not in left_out])


def add_local_options(parser: argparse.ArgumentParser) -> None:
    """Sampling and engine flags of a command that runs a model in its own process; one ``--seed`` serves both."""
    add_sampling_options(parser)
    add_engine_options(parser, without=("seed", *_SERVER_ONLY))


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each sampling parameter that makes sense for a single text."""
    add_struct_options(parser.add_argument_group("sampling options"), SamplingParams, SAMPLING_NAMES)


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine configuration that the flags describe."""
    values = given_options(options, EngineConfig)
    values["model"] = options.model
    return EngineConfig.from_kwargs(**values)


def fetch_model(config: EngineConfig) -> None:
    """Find the model, downloading it if need be, before anything slow is imported or started.

    Raises:
        ConfigError: there is no such model (says what was tried), or an option is wrong whatever the model.
    """
    from graphserve.engine.early_checks import find_model

    previous = progress.set_sink(progress.StreamSink())
    try:
        find_model(config, progress.byte_reporter())
    finally:
        progress.set_sink(previous)


def sampling_params(options: argparse.Namespace, defaults: dict[str, Any], **fixed: Any) -> SamplingParams:
    """Flags over the model's defaults; a temperature that neither names is 0, so that a command repeats its answer."""
    return SamplingParams(**{"temperature": 0.0, **defaults, **fixed, **given_options(options, SamplingParams)})
