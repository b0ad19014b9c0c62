"""One place that turns (schema, reference, fake) into an op of the ``gs`` namespace.

``Library.define`` and ``impl`` are used instead of ``torch.library.custom_op``: the reference then runs straight from
the dispatcher, without the Python wrapper that checks aliasing on every call. The references never return an alias of
an argument, which is the rule that wrapper exists to check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "gs"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``gs::<schema>`` with one implementation for all devices and a shape function.

    Args:
        schema: operator schema without namespace, for example ``"rope(Tensor x, ...) -> Tensor"``.
        reference: plain-torch implementation, called on real tensors of any device.
        fake: allocates outputs of the right shape and dtype; must work with symbolic sizes.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
