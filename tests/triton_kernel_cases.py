"""Runs generated Triton kernels beside their reference ops, and holds compiled ones to the golden files.

``GRAPHSERVE_UPDATE_GOLDEN=1 pytest tests/kernels/triton`` rewrites the golden sources instead of comparing, and widens
the budgets to what it measures: so one file holds for several Triton versions. Delete a budget file to start it anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphserve.kernels
from graphserve.kernels.arg_spec import ArgSpec
from graphserve.kernels.triton import TritonKernel, generate

graphserve.kernels.register_all()

GOLDEN = Path(__file__).parent / "kernels" / "triton" / "golden"
UPDATE = bool(os.environ.get("GRAPHSERVE_UPDATE_GOLDEN"))
DEFAULT_TARGET = "cuda:90"
FULL_TARGETS = ("cuda:80", "cuda:100", "hip:gfx942")

_GUARD = 64  # elements before and after an output that no kernel may touch


@dataclass
class Case:
    """One op with real tensors (fp32, fp16 and integers: what Triton's interpreter computes exactly).

    Attributes:
        name: of the test.
        op: name without ``gs.``.
        attrs: non-tensor arguments by name.
        args: tensor arguments, None for absent ones.
        dynamic: (argument index or "out", axis) → expression in step scalars; all outputs share "out".
        scalars: their values.
        mutated: arguments the op changes.
        reference: computes the results from the arguments; ``torch.ops.gs.<op>`` by default.
    """

    name: str
    op: str
    attrs: dict[str, Any]
    args: list[Tensor | None]
    dynamic: dict[tuple[int | str, int], str] = field(default_factory=dict)
    scalars: dict[str, int] = field(default_factory=dict)
    mutated: tuple[int, ...] = ()
    reference: Callable[..., Any] | None = None

    def expected(self) -> list[Tensor]:
        """Results of the reference, the mutated arguments after them."""
        args = [_copy(a) for a in self.args]
        outcome = (self.reference or getattr(torch.ops.gs, self.op))(*args, **self.attrs)
        outputs = [] if outcome is None else [outcome] if isinstance(outcome, Tensor) else list(outcome)
        return outputs + [args[i] for i in self.mutated]

    def kernels(self, target: str = DEFAULT_TARGET) -> list[TritonKernel]:
        """The generated kernels; a refusal fails the test with its reason."""
        results = self.expected()
        outputs = results[: len(results) - len(self.mutated)]
        args = [None if a is None else self._spec(a, i) for i, a in enumerate(self.args)]
        kernels = generate(f"gs.{self.op}", self.attrs, args, [self._spec(o, "out") for o in outputs], target)
        assert isinstance(kernels, TritonKernel | list), kernels
        return [kernels] if isinstance(kernels, TritonKernel) else kernels

    def run(self, target: str = DEFAULT_TARGET) -> list[Tensor]:
        """Results of the interpreted kernels in the order of :meth:`expected`; outputs start out as NaN.

        Raises:
            AssertionError: a kernel wrote beside an output or a mutated argument.
        """
        from graphserve.kernels.triton.compile import interpret

        args = [_copy(a) for a in self.args]
        results = self.expected()
        guarded = [_Guarded(o) for o in results[: len(results) - len(self.mutated)]]
        interpret(self.kernels(target), [*args, *(g.tensor for g in guarded)], self.scalars)
        for guard in guarded:
            guard.check()
        return [g.tensor for g in guarded] + [args[i] for i in self.mutated]

    def check(self, relative: float = 1e-5, absolute: float = 1e-5, target: str = DEFAULT_TARGET) -> None:
        """The interpreted kernels give the reference's results; integers must be equal."""
        for actual, expected in zip(self.run(target), self.expected(), strict=True):
            assert_close(actual, expected, relative, absolute)

    def _spec(self, tensor: Tensor, index: int | str) -> ArgSpec:
        shape = tuple(self.dynamic.get((index, axis), size) for axis, size in enumerate(tensor.shape))
        return ArgSpec(str(tensor.dtype).removeprefix("torch."), shape, tuple(tensor.stride()))


class _Guarded:
    """An output between two zones of a known bit pattern."""

    def __init__(self, like: Tensor) -> None:
        extent = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True)) + 1
        self._memory = torch.full((extent + 2 * _GUARD,), 0, dtype=like.dtype)
        self._memory.view(torch.uint8).fill_(0x5A)
        self.tensor = self._memory[_GUARD : _GUARD + extent].as_strided(like.shape, like.stride(), _GUARD)
        if like.dtype.is_floating_point:
            self.tensor.fill_(float("nan"))

    def check(self) -> None:
        memory = self._memory.view(torch.uint8)
        zone = _GUARD * self._memory.element_size()
        assert bool((memory[:zone] == 0x5A).all() and (memory[-zone:] == 0x5A).all()), "wrote beside an output"


def _copy(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    storage = tensor.untyped_storage().clone()  # as a whole: an expanded tensor has several elements in one place
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5, absolute: float = 1e-5) -> None:
    """Equal shapes and dtypes, equal integers, floats within ``relative`` and ``absolute`` of the mean size."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} against {expected.dtype}"
    if not expected.dtype.is_floating_point:
        assert torch.equal(actual, expected)
        return
    scale = expected.float().abs().mean().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=absolute * scale + 1e-30)


def check_golden_source(name: str, kernel: TritonKernel) -> None:
    """The kernel's text is that of ``golden/<name>.py.txt``."""
    path = GOLDEN / f"{name}.py.txt"
    if UPDATE:
        path.write_text(kernel.source)
    assert kernel.source == path.read_text(), f"{path.name} differs: see the module's docstring to rewrite it"


def check_budget(name: str, kernel: TritonKernel, target: str, file: str | Path = "budgets") -> None:
    """A compile for ``target`` stays within ``golden/<file>.json``: registers, shared memory, vector loads, matrix
    instructions; and nothing spills.

    Args:
        file: a name in the golden folder, or the path of a JSON file elsewhere.
    """
    from graphserve.kernels.triton.compile import compile_for

    compiled = compile_for(kernel, target)
    assert compiled.num_spills == 0, f"{name} on {target}: {compiled.num_spills} spills"
    path = file if isinstance(file, Path) else GOLDEN / f"{file}.json"
    budgets: dict[str, dict[str, dict[str, int]]] = json.loads(path.read_text()) if path.exists() else {}
    if UPDATE:
        old = budgets.setdefault(name, {}).get(target)
        new = {
            "registers": -(-compiled.num_registers // 16) * 16,
            "shared_bytes": -(-compiled.shared_bytes // 1024) * 1024,
            "vector_loads_128": compiled.num_vector_loads_128,
            "mma": min(1, compiled.num_mma),
        }
        limits = {"registers": max, "shared_bytes": max, "vector_loads_128": min, "mma": min}
        budgets[name][target] = {k: limit(new[k], old[k]) for k, limit in limits.items()} if old else new
        path.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    budget = budgets[name][target]
    measured = (
        f"{name} on {target}: {compiled.num_registers} registers, {compiled.shared_bytes} bytes shared, "
        f"{compiled.num_vector_loads_128} vector loads, {compiled.num_mma} matrix instructions; budget {budget}"
    )
    assert compiled.num_registers <= budget["registers"], measured
    assert compiled.shared_bytes <= budget["shared_bytes"], measured
    assert compiled.num_vector_loads_128 >= budget["vector_loads_128"], measured
    assert compiled.num_mma >= budget["mma"], measured
