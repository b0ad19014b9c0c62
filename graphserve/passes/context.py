"""What passes share while one graph is rewritten: node creation, new inputs, and what the plan must know.

Nothing here carries a fact from a pass's check to its replacement; a pass reads the graph again.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from graphserve.passes.base import Match
from graphserve.plan.schema import CacheSpec

# How a weight that a pass made comes from others: ("concat", names, dim) or ("transpose", [name], 0).
WeightRecipe = tuple[str, list[str], int]

# Sizes that hints of symbolic dimensions take; different ones, so that none of them is mistaken for another.
_HINTS = {"S": 5, "B": 7, "num_blocks": 11, "block_size": 13}


class PassContext:
    """One compilation's shared facts.

    Attributes:
        max_model_len: Rows of a position table.
        weight_recipes: How each weight made by a pass comes from the model's own, by its name.
        init_graphs: ``table.N`` → graph that computes it from ``positions`` [1, max_model_len] and weights; its
            placeholders carry ``meta["gs_input"]`` and ``meta["gs_weight"]`` like the main graph's.
        cache_layers: One :class:`CacheSpec` a cache layer, in the order of the attention nodes.
        cache_groups: ``(window, chunk)`` → indices into ``cache_layers``; a group's number is its place here.
    """

    def __init__(self, gm: fx.GraphModule, max_model_len: int) -> None:
        self.gm = gm
        self.max_model_len = max_model_len
        self.weight_recipes: dict[str, WeightRecipe] = {}
        self.init_graphs: dict[str, fx.GraphModule] = {}
        self.cache_layers: list[CacheSpec] = []
        self.cache_groups: dict[tuple[int | None, int | None], list[int]] = {}
        self.fake_mode = _fake_mode(gm.graph)
        self._sizes: dict[str, torch.SymInt] = {}
        self._results: dict[Hashable, Any] = {}
        self._placeholders = {
            (key, node.meta[key]): node
            for node in gm.graph.nodes
            for key in ("gs_input", "gs_weight")
            if node.op == "placeholder" and key in node.meta
        }
        self._unify_fake_modes()
        self._match: Match | None = None
        self._emitted: list[fx.Node] = []

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def _unify_fake_modes(self) -> None:
        """Recomputes values that the trace made under a fake mode of their own (an ``arange`` over a symbolic size)."""
        for node in self.graph.nodes:
            if node.op == "call_function" and not _in_mode(node.meta.get("val"), self.fake_mode):
                node.meta["val"] = self.fake_result(node)

    @contextmanager
    def replacing(self, match: Match) -> Iterator[list[fx.Node]]:
        """While open, emitted nodes take their module and sources from ``match``; yields the list they collect in."""
        self._match, self._emitted = match, []
        try:
            yield self._emitted
        finally:
            self._match = None

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call at the graph's insertion point and computes its fake value.

        Raises:
            Whatever the op raises for arguments of these shapes and dtypes.
        """
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self.fake_result(node)
        if self._match is not None:
            _inherit_meta(node, self._match)
        self._emitted.append(node)
        return node

    def fake_result(self, node: fx.Node) -> Any:
        """The value a call has on its arguments' fake values; adds no guard on T.

        Calls of one op on arguments of equal shapes, strides and dtypes share one value: layers repeat, fake tensors
        have no contents, and the graph is functional.
        """
        key = _described((node.target, node.args, node.kwargs))
        if key not in self._results:
            self._results[key] = self._compute_fake_result(node)
        return self._results[key]

    def _compute_fake_result(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target) and self.fake_mode.shape_env is not None
        with self.fake_mode, self.fake_mode.shape_env.suppress_guards(), torch.no_grad():
            return node.target(*args, **kwargs)

    def placeholder(self, name: str, key: str, val: torch.Tensor) -> fx.Node:
        """The placeholder with ``meta[key] == name``, added after the others when it is new."""
        if (key, name) in self._placeholders:
            return self._placeholders[key, name]
        last = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(last):
            node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.meta.update({key: name, "val": val})
        self._placeholders[key, name] = node
        return node

    def new_weight(self, name: str, like: torch.Tensor, recipe: WeightRecipe) -> fx.Node:
        """A weight of ``like``'s shape and dtype that the loader makes by ``recipe``."""
        self.weight_recipes[name] = recipe
        return self.placeholder(name, "gs_weight", like)

    def empty(self, sizes: tuple[Any, ...], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor in the graph's fake mode; one for all of a size and dtype."""
        key = _described(("empty", sizes, dtype))
        if key not in self._results:
            with self.fake_mode:
                self._results[key] = torch.empty(sizes, dtype=dtype, device=self._device())
        return self._results[key]

    def step_input(self, name: str) -> fx.Node:
        """``query_start_loc`` [S+1] int32, ``seq_lens`` [S] int32 or ``positions`` [1, T] int64."""
        if name == "positions":
            return self._positions()
        size = self._size("S") + 1 if name == "query_start_loc" else self._size("S")
        return self.placeholder(name, "gs_input", self.empty((size,), torch.int32))

    def cache_inputs(self, layer: int) -> tuple[fx.Node, fx.Node]:
        """Key cache ``kv_k.L`` and value cache ``kv_v.L``, each [num_blocks, kv_heads, block_size, dim]."""
        spec = self.cache_layers[layer]
        cache_dtype = getattr(torch, spec.dtype)
        blocks, block = self._size("num_blocks"), self._size("block_size")
        keys, values = (self.empty((blocks, spec.kv_heads, block, d), cache_dtype) for d in (spec.k_dim, spec.v_dim))
        kv_k = self.placeholder(f"kv_k.{layer}", "gs_input", keys)
        return kv_k, self.placeholder(f"kv_v.{layer}", "gs_input", values)

    def group_inputs(self, layer: int) -> tuple[fx.Node, fx.Node]:
        """``block_table.G`` [S, B] int32 and ``slot_mapping.G`` [T] int64 of the layer's cache group."""
        group = next(i for i, layers in enumerate(self.cache_groups.values()) if layer in layers)
        tokens = self.step_input("positions").meta["val"].shape[1]
        table = self.empty((self._size("S"), self._size("B")), torch.int32)
        slots = self.empty((tokens,), torch.int64)
        return (
            self.placeholder(f"block_table.{group}", "gs_input", table),
            self.placeholder(f"slot_mapping.{group}", "gs_input", slots),
        )

    def add_cache_layer(self, spec: CacheSpec) -> int:
        """Registers one attention layer's cache and returns its index."""
        index = len(self.cache_layers)
        self.cache_layers.append(spec)
        self.cache_groups.setdefault((spec.window, spec.chunk), []).append(index)
        return index

    def _positions(self) -> fx.Node:
        if ("gs_input", "positions") in self._placeholders:
            return self._placeholders["gs_input", "positions"]
        # The model itself reads no positions (no rotation, no position embedding).
        tokens = self._placeholders["gs_input", "input_ids"].meta["val"].shape[1]
        return self.placeholder("positions", "gs_input", self.empty((1, tokens), torch.int64))

    def _device(self) -> torch.device:
        return next(n.meta["val"].device for n in self.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))

    def _size(self, name: str) -> torch.SymInt:
        """A symbol for a size that varies from step to step or engine to engine."""
        if name not in self._sizes:
            hint = torch.empty(_HINTS[name], device=self._device())
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            fake = self.fake_mode.from_tensor(hint, source=ConstantSource(f"gs_{name}"), symbolic_context=context)
            size = fake.shape[0]
            assert isinstance(size, torch.SymInt)
            self._sizes[name] = size
        return self._sizes[name]


def _fake_mode(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        if isinstance(val := node.meta.get("val"), FakeTensor):
            return val.fake_mode
    raise ValueError("the graph holds no fake tensors: capture it with meta['val'] on every node")


def _described(argument: Any) -> Hashable:
    """Equal for two arguments exactly when an op cannot tell them apart but by the contents of tensors."""
    if isinstance(argument, fx.Node):
        return _described(argument.meta["val"])
    if isinstance(argument, torch.Tensor):
        return argument.dtype, str(argument.device), _described(argument.shape), _described(argument.stride())
    if isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return "symbol", argument.node.expr
    if isinstance(argument, (list, tuple)):
        return type(argument) is list, *map(_described, argument)
    if isinstance(argument, dict):
        return tuple((key, _described(value)) for key, value in sorted(argument.items()))
    if isinstance(argument, (bool, int, float)):
        return type(argument).__name__, repr(argument)  # 1, 1.0 and True are different arguments; so are 0.0 and -0.0
    return argument  # type: ignore[no-any-return]  # an op, a dtype, a string, None


def _in_mode(val: Any, mode: FakeTensorMode) -> bool:
    if isinstance(val, (list, tuple)):
        return all(_in_mode(item, mode) for item in val)
    return not isinstance(val, FakeTensor) or val.fake_mode is mode


def _inherit_meta(node: fx.Node, match: Match) -> None:
    if "gs_layer" in match.root.meta:  # the final norm takes in the last layer's add, but belongs to no layer
        node.meta["gs_layer"] = match.root.meta["gs_layer"]
    for key in ("gs_module", "nn_module_stack"):
        for source in (match.root, *match.nodes):
            if key in source.meta:
                node.meta[key] = source.meta[key]
                break
    names: dict[str, None] = {}
    for source in match.nodes:
        names.update(dict.fromkeys(source.meta.get("gs_sources", (source.name,))))
    node.meta["gs_sources"] = tuple(names)
