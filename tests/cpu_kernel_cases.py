"""Runs one generated C++ kernel beside its reference op on the same tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import graphserve.kernels
from graphserve.kernels.cpu import (
    ArgSpec,
    CompiledSequence,
    CppKernel,
    generate,
    pack_linear_weight,
    pack_moe_weights,
)

graphserve.kernels.register_all()

# Symbolic sizes by the value they take in a case, so that specs are derived from the tensors.
ROWS = "T"


@dataclass
class Case:
    """One op with real tensors. ``dynamic`` maps (argument index, axis) to a symbol; outputs use ("out", axis)."""

    name: str
    op: str
    attrs: dict[str, Any]
    args: list[Tensor | None]
    dynamic: dict[tuple[int | str, int], str] = field(default_factory=dict)
    scalars: dict[str, int] = field(default_factory=dict)
    mutated: tuple[int, ...] = ()
    packed_table: bool = False  # embedding reads the packed weight
    rounding: float = 1.0  # factor on the bf16 tolerance of ops that round between their steps
    contiguous: tuple[int | str, ...] = ()  # specs without strides: those of dynamic inner sizes

    def expected(self) -> list[Tensor]:
        """Results of the reference on fp32 copies of the arguments, the mutated arguments after them.

        A kernel rounds to bf16 where its op says so, and the comparison allows for that; the roundings a bf16
        reference adds between its steps are not the kernel's to repeat.
        """
        args = [a.float() if a is not None and a.dtype == torch.bfloat16 else _copy(a) for a in self.args]
        return self._reference(args)

    def _reference(self, args: list[Tensor | None]) -> list[Tensor]:
        if self.op == "gather_rows":
            return [args[0].reshape(-1, args[0].shape[-1])[args[1]]]
        attrs = {k: v for k, v in self.attrs.items() if k != "packed"}
        outcome = getattr(torch.ops.gs, self.op)(*args, **attrs)
        outputs = [] if outcome is None else [outcome] if isinstance(outcome, Tensor) else list(outcome)
        return outputs + [args[i] for i in self.mutated]

    def kernel(self, isa: str) -> CppKernel:
        """The generated kernel; a refusal fails the test with its reason."""
        args = [None if a is None else self._spec(a, i) for i, a in enumerate(self.args)]
        outputs = [self._spec(o, "out") for o in self._outputs()]
        kernel = generate(f"gs.{self.op}", self.attrs, args, outputs, isa)
        assert isinstance(kernel, CppKernel), kernel
        return kernel

    def run(self, function: int, library: Any, num_threads: int) -> list[Tensor]:
        """Results of the C++ kernel in the order of :meth:`expected`; outputs start out as NaN or 99."""
        args = [_copy(a) for a in self.args]
        pointed = list(args)
        if self.op == "linear":
            pointed[1] = pack_linear_weight(args[1])
        if self.packed_table:
            pointed[1] = pack_linear_weight(args[1])
        if self.op == "moe":
            gated = self.attrs.get("has_gate", True)
            layout = (self.attrs["transposed"], self.attrs["interleaved"], gated)
            pointed[3], pointed[5] = pack_moe_weights(args[3], args[5], *layout)
        outputs = [torch.full_like(o, float("nan") if o.is_floating_point() else 99) for o in self._outputs()]
        pointers = [None if t is None else t.data_ptr() for t in [*pointed, *outputs]]
        sequence = CompiledSequence(library, [(function, pointers)])
        s = self.scalars
        sequence.run(s.get("T", 0), s.get("R", 0), s.get("S", 0), num_threads, [s.get("B_0", 0)])
        return outputs + [args[i] for i in self.mutated]

    def _outputs(self) -> list[Tensor]:
        results = self._reference([_copy(a) for a in self.args])
        return results[: len(results) - len(self.mutated)]

    def _spec(self, tensor: Tensor, index: int | str) -> ArgSpec:
        shape = tuple(self.dynamic.get((index, axis), size) for axis, size in enumerate(tensor.shape))
        strides = None if index in self.contiguous else tuple(tensor.stride())
        return ArgSpec(str(tensor.dtype).removeprefix("torch."), shape, strides)


def _copy(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    # Dimensions of stride 0 repeat one element: it is copied once.
    once = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    copy = torch.empty_strided(once.shape, once.stride(), dtype=tensor.dtype).copy_(once)
    return copy.expand(tensor.shape)


def assert_close(actual: Tensor, expected: Tensor, rounding: float = 1.0) -> None:
    """Equal up to rounding: for fp32 1e-5 of a value and 5e-6 of the mean size, for bf16 1e-2 of both.

    ``rounding`` widens the bf16 bounds. ``expected`` is fp32, ``actual`` of the kernel's dtype.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    relative, absolute = (1e-2 * rounding, 1e-2 * rounding) if actual.dtype == torch.bfloat16 else (1e-5, 5e-6)
    scale = expected.float().abs().mean().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=absolute * scale + 1e-30)
