"""Remove from an L1 graph what ties it to the machine it was traced on: devices, assertions, constants.

After this no node mentions a device except creation ops, whose ``device`` argument the plan's device replaces.
"""

from __future__ import annotations

import torch
from torch import fx

from graphserve.errors import UnsupportedModelError

aten = torch.ops.aten

_ASSERTIONS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "_check"}


def canonicalize(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Rewrite ``gm`` in place.

    Returns:
        Constants that the model's Python made while tracing, now placeholders: weight name → CPU tensor.

    Raises:
        UnsupportedModelError: a constant's value is not known (made on the meta device).
    """
    constants: dict[str, torch.Tensor] = {}
    last_placeholder = None
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            last_placeholder = node
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            value = getattr(gm, str(node.target))
            if not isinstance(value, torch.Tensor):
                raise UnsupportedModelError(f"the trace holds a {type(value).__name__} constant ({node.target})")
            if value.device.type == "meta":
                raise UnsupportedModelError(f"the trace holds a constant without a value ({node.target})")
            name = f"constant.{len(constants)}"
            with gm.graph.inserting_after(last_placeholder):
                last_placeholder = gm.graph.placeholder(name.replace(".", "_"))
            last_placeholder.meta.update(node.meta)
            last_placeholder.meta["gs_weight"] = name
            constants[name] = value.detach().clone()
            node.replace_all_uses_with(last_placeholder)
            gm.graph.erase_node(node)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.name.split("::")[1] in _ASSERTIONS and not node.users:
                gm.graph.erase_node(node)
            else:
                _drop_device(gm, node)
    gm.recompile()
    return constants


def _drop_device(gm: fx.GraphModule, node: fx.Node) -> None:
    """``x.to(device, dtype)`` → ``x.to(dtype)``; the plan has one device."""
    target, dtype = node.target, None
    if target is aten.to.device:
        dtype = node.args[2] if len(node.args) > 2 else node.kwargs.get("dtype")
    elif target is aten.to.dtype_layout or target is aten._to_copy.default:
        dtype = node.kwargs.get("dtype")
    elif target is aten.to.other:
        dtype = node.args[1].meta["val"].dtype
    else:
        return
    source = node.args[0]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(aten.to.dtype, (source, dtype or source.meta["val"].dtype))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
