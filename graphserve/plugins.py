"""Passes and kernels from outside the package, found through entry points.

A distribution adds a pass with

    [project.entry-points."graphserve.passes"]
    my_pass = "my_package.my_pass:PASS"            # a graphserve.passes.base.Pass

which runs after the fusing passes, at full depth, and a kernel family with

    [project.entry-points."graphserve.kernels"]
    my_family = "my_package.my_family:register"    # a function without arguments, called once a process

where ``register`` defines the ops (``graphserve.kernels.registry.register``: schema, reference, fake) and, if it has
them, their generators (``graphserve.kernels.cpu.generate.GENERATORS[name] = ...``). An op without a generator runs its
reference. Names and versions of the distributions are factors of a stored plan's key.
"""

from __future__ import annotations

from importlib import metadata
from typing import TypeVar

from graphserve.errors import ConfigError

PASSES = "graphserve.passes"
KERNELS = "graphserve.kernels"

_Item = TypeVar("_Item")


def load(group: str, wanted: type[_Item]) -> list[_Item]:
    """The objects of a group's entry points, in the order of their names.

    Raises:
        ConfigError: one cannot be imported or is no ``wanted``; names the entry point and its distribution.
    """
    items = []
    for entry in sorted(metadata.entry_points(group=group), key=lambda e: e.name):
        where = f"entry point {entry.name} ({entry.value}) of {_origin(entry)}"
        try:
            item = entry.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{where} cannot be imported: {error}. Mend or uninstall that distribution") from error
        if not isinstance(item, wanted):
            raise ConfigError(
                f"{where} is a {type(item).__name__}, {group} wants a {wanted.__name__}: mend or uninstall that "
                "distribution"
            )
        items.append(item)
    return items


def versions() -> list[str]:
    """``group:name=distribution version`` of every entry point, sorted: what a plan made here depends on."""
    return sorted(
        f"{group}:{entry.name}={_origin(entry)}"
        for group in (PASSES, KERNELS)
        for entry in metadata.entry_points(group=group)
    )


def _origin(entry: metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"
