"""Remove from an L1 graph what ties it to the machine it was traced on: devices, assertions, constants.

After this no node mentions a device except creation ops, whose ``device`` argument the plan's device replaces.

A model that numbers its tokens itself (``arange(T)``) means the positions of one request that starts at 0; packed with
others, the numbers are the ``positions`` input.
"""

from __future__ import annotations

import torch
from torch import fx

from graphserve.errors import UnsupportedModelError

aten = torch.ops.aten

# These give back their argument itself, so the tracer takes all later uses of the argument for uses of the result:
# an alias made inside one layer would then seem to be handed to the next.
_IDENTITIES = {aten.contiguous, aten.alias, aten.detach, aten.lift_fresh, aten.resolve_conj, aten.resolve_neg}

# Second names of an op: checks and passes know the first.
_ALIASES = {
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
}

_ASSERTIONS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "_check"}


def canonicalize(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Rewrite ``gm`` in place.

    Returns:
        Constants that the model's Python made while tracing, now placeholders: weight name → CPU tensor.

    Raises:
        UnsupportedModelError: a constant's value is not known (made on the meta device).
    """
    constants: dict[str, torch.Tensor] = {}
    made_constants: list[fx.Node] = []
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
            made = next((p for p in made_constants if _same_bits(constants[p.meta["gs_weight"]], value)), None)
            if made is None:
                name = f"constant.{len(constants)}"
                with gm.graph.inserting_after(last_placeholder):
                    made = last_placeholder = gm.graph.placeholder(name.replace(".", "_"))
                made.meta.update(node.meta)
                made.meta["gs_weight"] = name
                constants[name] = value.detach().clone()
                made_constants.append(made)
            node.replace_all_uses_with(made)
            gm.graph.erase_node(node)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            node.target = _ALIASES.get(node.target, node.target)
            if node.target._schema.name.split("::")[1] in _ASSERTIONS and not node.users:
                gm.graph.erase_node(node)
            elif node.target.overloadpacket is aten.arange:
                _number_by_position(gm, node)
            elif _is_identity(node):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
            else:
                _drop_device(gm, node)
    gm.recompile()
    return constants


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal constants are one: each layer makes its own, and layers of a type must look alike."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _is_identity(node: fx.Node) -> bool:
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    return packet in _IDENTITIES or (packet is aten.dropout and node.args[2] is False)


def _number_by_position(gm: fx.GraphModule, node: fx.Node) -> None:
    """``arange(T)`` → ``positions[0]``."""
    ids = next((n for n in gm.graph.nodes if n.meta.get("gs_input") == "input_ids"), None)
    if ids is None or str(node.meta["val"].shape[0]) != str(ids.meta["val"].shape[1]):
        return
    starts_at_zero = node.target is aten.arange.default or node.args[0] == 0
    unit_step = len(node.args) < 3 or node.args[2] == 1
    if not (starts_at_zero and unit_step):
        return
    positions = _positions(gm, ids)
    value = node.meta["val"]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(aten.select.int, (positions, 0, 0))
        new.meta = {**node.meta, "val": positions.meta["val"][0]}
        if value.dtype != torch.int64:
            cast = gm.graph.call_function(aten.to.dtype, (new, value.dtype))
            cast.meta = dict(node.meta)
            new = cast
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _positions(gm: fx.GraphModule, ids: fx.Node) -> fx.Node:
    """The placeholder of the positions; a model that numbers its tokens itself has not asked for it."""
    for node in gm.graph.nodes:
        if node.meta.get("gs_input") == "positions":
            return node
    with gm.graph.inserting_after(ids):
        node = gm.graph.placeholder("positions")
    node.meta = {"gs_input": "positions", "val": torch.empty_like(ids.meta["val"])}
    return node


def _drop_device(gm: fx.GraphModule, node: fx.Node) -> None:
    """``x.to(device, dtype)`` → ``x.to(dtype)``; the plan has one device."""
    target, dtype = node.target, None
    if target is aten.to.device:
        dtype = node.args[2] if len(node.args) > 2 else node.kwargs.get("dtype")
    elif target is aten.to.dtype_layout or target is aten._to_copy.default:
        dtype = node.kwargs.get("dtype")
    elif target is aten.to.other:
        dtype = node.args[1].meta["val"].dtype
    elif target is aten.to.dtype:
        dtype = node.args[1]
    else:
        return
    source = node.args[0]
    if dtype in (None, source.meta["val"].dtype):
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
        return
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(aten.to.dtype, (source, dtype))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
