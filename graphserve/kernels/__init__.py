"""The ``gs`` ops: for each family a plain-torch reference, its fake, and (in ``cpu/``) generated C++.

Importing this package registers nothing, so that the engine side can import names below it without torch.
:func:`register_all` makes every op of the table in DECISIONS.md available as ``torch.ops.gs.*``.
"""

from __future__ import annotations

import importlib

FAMILIES = ("norm", "linear", "activation", "rope", "kv_cache", "attention", "moe", "embedding")


def register_all() -> None:
    """Register every op of every family. Calling it again does nothing (modules register at import)."""
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
