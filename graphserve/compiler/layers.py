"""Layers by type: trace one or two layers of each type and repeat them, so compile time does not grow with depth.

Two layers have the same type when everything that their code can see is equal but the layer number: classes, parameter
shapes, plain attributes, the layer type in the config. The model is traced with the first and the last layer of each
type only. Marker nodes (``gs.layer_begin``, ``gs.layer_end``) bound each layer's nodes in the graph. If both traced
layers of a type gave the same nodes, the type's graph is repeated for every layer; if not, or if layers hand each other
more than the hidden state, the model is traced at full depth instead.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX_NAMES = re.compile(r"^_?layer_?(idx|id|index|number)$")
# Uses of the layer number that cannot change the mathematics without a cache.
_HARMLESS_USE = re.compile(r"past_key_value|\.update\(|logger|warn|cache|def |layer_idx=self\.layer_idx|^\s*#")


@dataclass(frozen=True)
class LayerStack:
    """The decoder layers of a model.

    Attributes:
        path: module path of the ModuleList, such as ``model.layers``.
        types: type number of each layer.
        traced: original numbers of the layers that are traced, in order.
    """

    path: str
    types: tuple[int, ...]
    traced: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.types)

    @property
    def is_reduced(self) -> bool:
        return len(self.traced) < self.depth

    def representative(self, layer: int) -> int:
        """The traced layer whose graph stands for ``layer``."""
        if layer in self.traced:
            return layer
        return next(t for t in self.traced if self.types[t] == self.types[layer])


def find_layers(model: PreTrainedModel, full_depth: bool = False) -> LayerStack | None:
    """The stack of decoder layers, or None when the model has no recognisable one (then it is traced whole).

    Args:
        full_depth: trace every layer even if types repeat.
    """
    config = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", None)
    decoder = set(model.get_decoder().modules())  # an image tower may have as many layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and module in decoder
    ]
    if not lists:
        return None
    # Several lists of this length (norms beside layers, say): the layers are the one with most parameters.
    path, layers = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    layer_types = getattr(config, "layer_types", None) or [None] * len(layers)
    numbers: dict[Hashable, int] = {}
    types = tuple(
        numbers.setdefault(_signature(layer, layer_types[i], i), len(numbers)) for i, layer in enumerate(layers)
    )
    if full_depth:
        traced = set(range(len(types)))
    else:
        traced = {types.index(t) for t in numbers.values()}
        traced |= {len(types) - 1 - types[::-1].index(t) for t in numbers.values()}
    return LayerStack(path, types, tuple(sorted(traced)))


def _signature(layer: nn.Module, layer_type: str | None, index: int) -> Hashable:
    parts: list[Hashable] = [layer_type]
    for name, module in layer.named_modules():
        parts.append((name, type(module).__qualname__, type(module).__module__))
        for key, value in sorted(vars(module).items()):
            if not _INDEX_NAMES.match(key) and key not in ("_parameters", "_buffers", "_modules"):
                plain = _plain(value)
                if plain is not None:
                    parts.append((key, plain))
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        parts.extend((n, tuple(t.shape), str(t.dtype)) for n, t in tensors)
        if _forward_uses_layer_number(type(module)):  # type: ignore[arg-type]  # mypy takes a class for unhashable
            parts.append(("layer number", index))
    return tuple(parts)


def _plain(value: Any) -> Hashable | None:
    if isinstance(value, (bool, int, float, str)):
        return (type(value).__name__, value)
    if isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, float, str)) for v in value):
        return tuple(value)
    if inspect.isfunction(value):
        return value.__qualname__
    return None


@functools.cache
def _forward_uses_layer_number(cls: type[nn.Module]) -> bool:
    try:
        source = inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False
    uses = [line for line in source.splitlines() if re.search(r"self\._?layer_?(idx|id|index|number)\b", line)]
    return any(not _HARMLESS_USE.search(line) for line in uses)


@contextlib.contextmanager
def marked(model: PreTrainedModel, stack: LayerStack) -> Iterator[None]:
    """Within the context ``model`` has only the traced layers, each between marker nodes."""
    parent_path, _, name = stack.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    layers = getattr(parent, name)
    undo: list[Callable[[], Any]] = []
    setattr(parent, name, nn.ModuleList([layers[i] for i in stack.traced]))
    undo.append(lambda: setattr(parent, name, layers))
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in list(configs.values()):
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        configs[id(text)] = text
    for config in configs.values():
        values = vars(config)
        for key, value in list(values.items()):
            if key == "num_hidden_layers" and value == stack.depth:
                reduced: Any = len(stack.traced)
            elif isinstance(value, (list, tuple)) and len(value) == stack.depth:
                reduced = type(value)(value[i] for i in stack.traced)
            else:
                continue
            values[key] = reduced
            undo.append(_restore(values, key, value))
    for number in stack.traced:
        undo.extend(_mark(layers[number], number))
    try:
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _restore(values: dict[str, Any], key: str, value: Any) -> Callable[[], None]:
    def restore() -> None:
        values[key] = value

    return restore


def _mark(layer: nn.Module, number: int) -> list[Callable[[], None]]:
    def begin(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            return (torch.ops.gs.layer_begin(args[0], number), *args[1:]), kwargs
        if isinstance(kwargs.get("hidden_states"), torch.Tensor):
            return args, {**kwargs, "hidden_states": torch.ops.gs.layer_begin(kwargs["hidden_states"], number)}
        return args, kwargs

    def end(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return torch.ops.gs.layer_end(output, number)
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            return (torch.ops.gs.layer_end(output[0], number), *output[1:])
        return output

    pre = layer.register_forward_pre_hook(begin, with_kwargs=True)
    post = layer.register_forward_hook(end)
    return [pre.remove, post.remove]


@dataclass
class Region:
    """The nodes of one traced layer, in order, markers excluded."""

    layer: int
    begin: fx.Node
    end: fx.Node
    nodes: list[fx.Node]


def regions(graph: fx.Graph) -> dict[int, Region]:
    """Layer number → its nodes. Program order bounds a layer exactly: the trace ran them one after the other."""
    found: dict[int, Region] = {}
    current: Region | None = None
    for node in graph.nodes:
        if node.target is torch.ops.gs.layer_begin.default:
            current = Region(node.args[1], node, node, [])
        elif node.target is torch.ops.gs.layer_end.default and current is not None:
            current.end = node
            found[current.layer] = current
            current = None
        elif current is not None:
            current.nodes.append(node)
    return found


def number_layers(gm: fx.GraphModule, stack: LayerStack) -> None:
    """Set ``meta["gs_layer"]`` of each layer's nodes, and the layer's own number in ``meta["gs_module"]``."""
    for region in regions(gm.graph).values():
        for node in region.nodes:
            _place(node, stack.path, region.layer)


def _place(node: fx.Node, path: str, layer: int) -> None:
    node.meta["gs_layer"] = layer
    if module := node.meta.get("gs_module"):  # numbered by the traced layers alone
        node.meta["gs_module"] = re.sub(rf"^{re.escape(path)}\.\d+", f"{path}.{layer}", module)


def drop_markers(gm: fx.GraphModule) -> None:
    """Remove the marker nodes of a graph that holds every layer already."""
    for node in list(gm.graph.nodes):
        if node.target in (torch.ops.gs.layer_begin.default, torch.ops.gs.layer_end.default):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def why_not_repeatable(gm: fx.GraphModule, stack: LayerStack) -> str | None:
    """A sentence why the traced layers cannot stand for the others, or None if they can."""
    found = regions(gm.graph)
    if set(found) != set(stack.traced):
        return "layers do not take and give the hidden state as a tensor"
    if _between_layers(gm.graph, found) is None:
        return "the model computes something of its own between layers"
    owner = {node: layer for layer, region in found.items() for node in region.nodes}
    for layer, region in found.items():
        for node in region.nodes:
            outside = [u for u in node.users if owner.get(u) != layer and u is not region.end]
            if outside:
                return f"layer {layer} hands {node.name} to {outside[0].name} beside the hidden state"
    for before, after in zip(stack.traced, stack.traced[1:], strict=False):
        if found[after].begin.args[0] is not found[before].end or len(found[before].end.users) != 1:
            return f"the model computes something of its own between layers {before} and {after}"
    if not stack.is_reduced:
        return None  # every layer stands for itself
    first: dict[int, int] = {}
    for layer in stack.traced:
        other = first.setdefault(stack.types[layer], layer)
        if other != layer and _shape_of(found[other], stack.path) != _shape_of(found[layer], stack.path):
            return f"layers {other} and {layer} look alike but trace differently"
    return None


def _between_layers(graph: fx.Graph, found: dict[int, Region]) -> list[fx.Node] | None:
    """Nodes outside the layers that come before the last layer's end, in order; None if one depends on a layer."""
    owned = {node for r in found.values() for node in (*r.nodes, r.begin, r.end)}
    last_end = max(found.items())[1].end
    outside: list[fx.Node] = []
    for node in graph.nodes:
        if node is last_end:
            return outside
        if node not in owned:
            if any(n in owned for n in node.all_input_nodes):
                return None
            outside.append(node)
    return outside


def _shape_of(region: Region, path: str) -> list[Any]:
    """The region with node names made relative, for comparison."""
    numbers = {node: i for i, node in enumerate(region.nodes)}
    prefix = f"{path}.{region.layer}."

    def relative(node: fx.Node) -> Any:
        if node in numbers:
            return ("local", numbers[node])
        if node is region.begin:
            return "hidden"
        if isinstance(node.meta.get("val"), torch.SymInt):
            return ("size", str(node.meta["val"]))  # several nodes may hold one size
        weight = node.meta.get("gs_weight")
        if weight is not None and weight.startswith(prefix):
            return ("weight", weight[len(prefix) :])
        return ("outer", node.name)

    shape: list[Any] = []
    for node in region.nodes:
        args = fx.node.map_arg((node.args, node.kwargs), relative)
        if node.target is torch.ops.gs.attention_trace.default:
            args = (args[0][:4] + args[0][5:], args[1])
        shape.append((node.target, str(args)))
    shape.append(fx.node.map_arg(region.end.args[0], relative))
    return shape


def repeat_layers(gm: fx.GraphModule, stack: LayerStack) -> fx.GraphModule:
    """Build the full-depth graph from the traced layers and drop the markers.

    Weights of layer i get their own placeholders, named after the representative's with the layer number changed;
    attention nodes get their layer number. Node order and ``meta`` are kept; ``meta["gs_layer"]`` is set.
    """
    found = regions(gm.graph)
    path = stack.path
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    weights: dict[str, fx.Node] = {}
    last_placeholder: fx.Node | None = None
    owned = {node for r in found.values() for node in (*r.nodes, r.begin, r.end)}

    def copy(node: fx.Node, lookup: Callable[[fx.Node], fx.Node]) -> fx.Node:
        nonlocal last_placeholder
        result = new.node_copy(node, lookup)
        result.meta = dict(node.meta)
        if node.op == "placeholder":
            last_placeholder = result
            if "gs_weight" in node.meta:
                weights[node.meta["gs_weight"]] = result
        return result

    def weight_of(node: fx.Node, layer: int, representative: int) -> fx.Node:
        name = node.meta["gs_weight"]
        prefix = f"{path}.{representative}."
        if not name.startswith(prefix):
            return env[node]
        wanted = f"{path}.{layer}." + name[len(prefix) :]
        if wanted not in weights:
            nonlocal last_placeholder
            assert last_placeholder is not None
            with new.inserting_after(last_placeholder):
                made = new.placeholder(re.sub(r"\W", "_", wanted))
            made.meta = {**node.meta, "gs_weight": wanted}
            weights[wanted] = last_placeholder = made
        return weights[wanted]

    def emit_layer(layer: int, hidden: fx.Node) -> fx.Node:
        representative = stack.representative(layer)
        region = found[representative]
        local: dict[fx.Node, fx.Node] = {region.begin: hidden}

        def lookup(node: fx.Node) -> fx.Node:
            if node in local:
                return local[node]
            if "gs_weight" in node.meta:
                return weight_of(node, layer, representative)
            return env[node]

        for node in region.nodes:
            made = copy(node, lookup)
            _place(made, path, layer)
            if node.target is torch.ops.gs.attention_trace.default:
                made.args = (*made.args[:4], layer, *made.args[5:])
            local[node] = made
        return lookup(region.end.args[0])

    outside = _between_layers(gm.graph, found)
    assert outside is not None, "why_not_repeatable comes first"
    for node in outside:
        env[node] = copy(node, lambda n: env[n])
    hidden = env[found[stack.traced[0]].begin.args[0]]
    for layer in range(stack.depth):
        hidden = emit_layer(layer, hidden)
    last_end = found[stack.traced[-1]].end
    env[last_end] = hidden
    for node in gm.graph.nodes:
        if node.op == "output":
            new.output(fx.node.map_arg(node.args[0], lambda n: env[n]))
        elif node not in owned and node not in env:
            env[node] = copy(node, lambda n: env[n])
    full = fx.GraphModule(gm, new)
    full.meta = dict(gm.meta)
    full.graph.lint()
    return full
