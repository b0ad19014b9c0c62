"""The ``gs`` ops: for each family a plain-torch reference, its fake, and (in ``cpu/``) generated C++.

Importing this package registers nothing, so that the engine side can import names below it without torch.
:func:`register_all` makes every op of the table in DECISIONS.md available as ``torch.ops.gs.*``.
"""

from __future__ import annotations

import functools
import importlib
from types import FunctionType

from graphserve import plugins

FAMILIES = (
    "norm", "linear", "activation", "rope", "kv_cache", "attention", "moe", "embedding",
    "quantize", "sampling", "quantized_linear", "route", "pointwise", "step",
)  # fmt: skip


@functools.cache
def register_all() -> None:
    """Register every op of every family, other distributions' families too. Calling it again does nothing.

    Raises:
        ConfigError: another distribution's entry point is unusable (see :mod:`graphserve.plugins`).
    """
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
    for register in plugins.load(plugins.KERNELS, FunctionType):
        register()
