"""What every family's generator works with: the arguments of one launch, and the entry it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphserve.kernels.cpu.kernel import ArgSpec, Refused


@dataclass(frozen=True)
class Call:
    """One launch to generate: op name without ``gs.``, attributes by name, tensor arguments and outputs."""

    op: str
    attrs: dict[str, Any]
    args: list[ArgSpec | None]
    outputs: list[ArgSpec]

    def tensor(self, index: int, name: str) -> ArgSpec:
        """Tensor argument ``index``, which must be present."""
        if index >= len(self.args) or self.args[index] is None:
            raise Refused(f"{self.op} needs {name} (argument {index})")
        spec = self.args[index]
        assert spec is not None
        return spec

    def optional(self, index: int) -> ArgSpec | None:
        """Tensor argument ``index`` or None."""
        return self.args[index] if index < len(self.args) else None

    def attr(self, name: str) -> Any:
        """An attribute, which must be given."""
        if name not in self.attrs:
            raise Refused(f"{self.op} needs the attribute {name!r}; given: {', '.join(self.attrs) or 'none'}")
        return self.attrs[name]


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
