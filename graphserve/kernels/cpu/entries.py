"""What every family's generator works with: the arguments of one launch, and the entry it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphserve.kernels.arg_spec import Call


@dataclass(frozen=True)
class Entry:
    """The body of one entry function and the templates it instantiates (after the prelude)."""

    families: tuple[str, ...]
    body: str


EntryGenerator = Callable[[Call], Entry]


def call_template(name: str, template_args: list[str], args: list[str]) -> str:
    """``name<template_args>(args);``"""
    return f"  {name}<{', '.join(template_args)}>(\n      {', '.join(args)});"


def flag(value: bool) -> str:
    """A C++ bool literal."""
    return "true" if value else "false"
