"""L2 graph → launch list: names, symbolic shapes, and which nodes are mere views."""

from __future__ import annotations

import math
import operator
from typing import Any

import sympy
import torch
from torch import fx

from graphserve.errors import CompileError
from graphserve.kernels.pointwise_program import Instruction, PointwiseProgram
from graphserve.plan.schema import Launch, TensorSpec
from graphserve.plan.symbols import Affine

# Ops that only move elements to where the plan wants them.
_COPIES = (
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.reshape.default,
)
# Sizes at which view-ness is decided. Odd primes: no model dimension equals them.
_TOKENS, _ROWS = 13, 7


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Lowering:
    """Turns one graph into launches.

    Args:
        tokens: the symbol of the token count in the graph's fake tensors, or None if it has none.
        rows: the symbol of the logits row count, or None.
        prefix: put before buffer names (init graphs have their own name space).
    """

    def __init__(self, tokens: Any | None, rows: Any | None, prefix: str = "") -> None:
        self._tokens = tokens
        self._rows = rows
        self._prefix = prefix
        self.launches: list[Launch] = []
        self.buffers: dict[str, TensorSpec] = {}
        self._names: dict[fx.Node, str] = {}
        self._samples: dict[fx.Node, Any] = {}  # meta tensors at the sample sizes, with the strides buffers will have

    def value_name(self, node: fx.Node) -> str:
        return self._names[node]

    def add_input(self, node: fx.Node, name: str) -> None:
        """Declare a placeholder as the value ``name``."""
        value = node.meta["val"]
        self._names[node] = name
        self._samples[node] = torch.empty([self._sample_size(d) for d in value.shape], dtype=value.dtype, device="meta")

    def add_opaque_input(self, node: fx.Node, name: str) -> None:
        """Declare a step input or cache whose own sizes (sequences, blocks) never reach a buffer."""
        value = node.meta["val"]
        self._names[node] = name
        sizes = [d if isinstance(d, int) else self._opaque_size(d) for d in value.shape]
        self._samples[node] = torch.empty(sizes, dtype=value.dtype, device="meta")

    def _opaque_size(self, size: Any) -> int:
        known = size.node.expr.free_symbols <= {self._tokens, self._rows}
        return self._sample_size(size) if known else 3

    def affine(self, size: Any) -> int | Affine:
        """A SymInt or int as an affine expression.

        Raises:
            CompileError: the size is not affine in T and R (a [T, T] tensor, say).
        """
        if isinstance(size, int):
            return size
        expr = sympy.expand(size.node.expr)
        t = expr.coeff(self._tokens, 1) if self._tokens is not None else sympy.Integer(0)
        r = expr.coeff(self._rows, 1) if self._rows is not None else sympy.Integer(0)
        rest = sympy.expand(expr - sum(k * s for k, s in ((t, self._tokens), (r, self._rows)) if s is not None))
        if not (t.is_Integer and r.is_Integer and rest.is_Integer):
            raise CompileError(f"size {expr} is not affine in the number of tokens and logits rows")
        if t == 0 and r == 0:
            return int(rest)
        return Affine(int(t), int(r), int(rest))

    def tensor_spec(self, value: torch.Tensor) -> TensorSpec:
        shape = tuple(d if isinstance(d, int) else str(d) for d in map(self.affine, value.shape))
        return TensorSpec(shape, dtype_name(value.dtype))

    def _sample_size(self, size: Any) -> int:
        affine = self.affine(size)
        return affine if isinstance(affine, int) else affine.at(_TOKENS, _ROWS)

    def lower(self, graph: fx.Graph) -> fx.Node:
        """Lower all nodes. Inputs must have been declared. Returns the output node."""
        for node in graph.nodes:
            if node.op == "call_function":
                self._lower_node(node)
            elif node.op == "output":
                output = node.args[0]
                while isinstance(output, (tuple, list)):
                    output = output[0]
                return output
            elif node.op != "placeholder":
                raise CompileError(f"{node.format_node()}: {node.op} nodes cannot be lowered")
        raise CompileError("the graph has no output")

    def _lower_node(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int, torch.SymFloat, float, bool, torch.SymBool)):
            return  # sizes are folded into the arguments that use them
        if node.target is operator.getitem:
            source, index = node.args
            self._names[node] = f"{self._names[source]}.{index}"
            self._samples[node] = self._samples[source][index]
            return
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise CompileError(f"{node.format_node()}: not an operator")
        name = self._prefix + node.name
        if target.namespace == "gs" and target is not torch.ops.gs.pointwise.default:  # which takes any strides
            self._make_rows(node, name)
        self._names[node] = name
        results, is_view, target = self._sample(node, target)
        if target in _COPIES and not is_view:
            self._lower_copy(node, name, results)
            return
        if value is None:
            outputs: tuple[str | None, ...] = ()
        elif isinstance(value, torch.Tensor):
            outputs = (name,)
            if not is_view:
                self.buffers[name] = self.tensor_spec(value)
        else:
            read = {u.args[1] for u in node.users if u.target is operator.getitem}
            if target.namespace == "gs":
                read = set(range(len(value)))  # a generated kernel writes all of its results
            outputs = tuple(f"{name}.{i}" if i in read else None for i in range(len(value)))
            if not is_view:
                self.buffers.update({f"{name}.{i}": self.tensor_spec(value[i]) for i in read})
        self._samples[node] = results
        self.launches.append(
            Launch(
                op=f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}",
                args=tuple(self._encode(a) for a in node.args),
                kwargs={k: self._encode(v) for k, v in node.kwargs.items()},
                outputs=outputs,
                kind="view" if is_view else "reference",
                layer=node.meta.get("gs_layer"),
                sources=tuple(node.meta.get("gs_sources", (node.name,))),
            )
        )

    def _make_rows(self, node: fx.Node, name: str) -> None:
        """Copy arguments that lie in memory as kernels do not take them: rows with gaps between their elements, and
        tokens within another dimension, such as heads, whose stride then grows with the number of tokens.
        """
        for number, argument in enumerate(node.all_input_nodes):
            sample = self._samples.get(argument)
            if argument.op == "placeholder" or not isinstance(sample, torch.Tensor):
                continue
            if sample.is_contiguous() or not (_has_gaps(sample) or _strides_vary(argument.meta["val"], sample)):
                continue  # a copy of what lies in order already would look the same
            copy = f"{name}.in{number}"
            self._copy(self._names[argument], argument, copy, node)
            self._names[argument] = copy  # for later readers too: it holds the same values
            self._samples[argument] = torch.empty(sample.shape, dtype=sample.dtype, device="meta")

    def _copy(self, source: str, like: fx.Node, copy: str, for_node: fx.Node) -> None:
        """A launch that makes ``source`` contiguous, in a buffer of its own."""
        value = like.meta["val"]
        clone = Instruction("aten.clone.default", ({"v": 0},), dtype_name(value.dtype))
        program = PointwiseProgram(1, (clone,), (1,))
        self.buffers[copy] = self.tensor_spec(value)
        layer = for_node.meta.get("gs_layer")
        sources = tuple(for_node.meta.get("gs_sources", (for_node.name,)))
        args = ([{"v": source}], program.encode())
        self.launches.append(Launch("gs.pointwise.default", args, {}, (copy,), layer=layer, sources=sources))

    def _lower_copy(self, node: fx.Node, name: str, sample: torch.Tensor) -> None:
        """A clone, or a reshape that cannot be a view: one elementwise kernel that makes its input contiguous."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        is_reshaped = node.target not in (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default)
        copy = f"{name}.copy" if is_reshaped else name
        self._copy(self._names[source], source if is_reshaped else node, copy, node)
        self._samples[node] = sample
        if is_reshaped:
            view = ({"v": copy}, *(self._encode(a) for a in node.args[1:]))
            op = "aten.reshape.default"
            last = self.launches[-1]
            self.launches.append(Launch(op, view, {}, (name,), "view", last.layer, last.sources))

    def _sample(self, node: fx.Node, target: Any) -> tuple[Any, bool, Any]:
        """Run the op on meta tensors with the strides our buffers have: (result, is it a view, op to use)."""
        args = [self._sample_argument(a) for a in node.args]
        kwargs = {k: self._sample_argument(v) for k, v in node.kwargs.items()}
        if target is torch.ops.aten.view.default:
            # The original view may rest on strides that an op kept; our buffers are contiguous.
            target = torch.ops.aten.reshape.default
        results = target(*args, **kwargs)
        first = results[0] if isinstance(results, (tuple, list)) and results else results
        if not isinstance(first, torch.Tensor):
            return results, False, target
        inputs = [a for a in args if isinstance(a, torch.Tensor)]
        is_view = bool(inputs) and _shares_storage(first, inputs[0])
        if is_view:
            return results, True, target
        if isinstance(results, torch.Tensor):
            return torch.empty(results.shape, dtype=results.dtype, device="meta"), False, target
        fresh = [
            torch.empty(r.shape, dtype=r.dtype, device="meta") if isinstance(r, torch.Tensor) else r for r in results
        ]
        return fresh, False, target

    def _sample_argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument in self._samples:
                return self._samples[argument]
            return self._sample_size(argument.meta["val"])
        if isinstance(argument, (list, tuple)):
            return [self._sample_argument(a) for a in argument]
        if isinstance(argument, torch.SymInt):
            return self._sample_size(argument)
        if isinstance(argument, torch.device):
            return torch.device("meta")
        return argument

    def _encode(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument in self._names:
                return {"v": self._names[argument]}
            return self._encode(argument.meta["val"])
        if isinstance(argument, torch.SymInt):
            affine = self.affine(argument)
            return affine if isinstance(affine, int) else {"s": str(affine)}
        if isinstance(argument, (list, tuple)):
            return [self._encode(a) for a in argument]
        if isinstance(argument, torch.dtype):
            return {"dtype": dtype_name(argument)}
        if isinstance(argument, torch.device):
            return {"device": True}
        if isinstance(argument, torch.layout):
            return {"layout": str(argument).removeprefix("torch.")}
        if isinstance(argument, torch.memory_format):
            return {"memory_format": str(argument).removeprefix("torch.")}
        if isinstance(argument, float) and not math.isfinite(argument):
            return {"f": str(argument)}
        if argument is None or isinstance(argument, (bool, int, float, str)):
            return argument
        raise CompileError(f"argument {argument!r} of type {type(argument).__name__} has no JSON form")


def _has_gaps(sample: torch.Tensor) -> bool:
    return sample.dim() > 0 and sample.shape[-1] > 1 and sample.stride(-1) != 1


def _strides_vary(value: torch.Tensor, sample: torch.Tensor) -> bool:
    """Whether a dimension of fixed size lies outside one that varies, so that its stride varies too."""
    varying = [sample.stride(axis) for axis, size in enumerate(value.shape) if not isinstance(size, int)]
    fixed = [sample.stride(axis) for axis, size in enumerate(value.shape) if isinstance(size, int) and size > 1]
    return bool(varying and fixed) and max(fixed) > min(varying)


def _shares_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
