"""Triton's interpreter beside its compiler, in one process.

Triton chooses between the two when ``@triton.jit`` runs, from an environment variable that must be set before its
first import, and its interpreter leaves the language module changed. Here the functions of one generated module, and
those of Triton's own library while a kernel runs, are wrapped for the interpreter, and every changed name is put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import triton.experimental.gluon  # noqa: F401  imported by Triton at the first launch, and fails in the changed language
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle
from triton.runtime.jit import JITFunction

_library: dict[int, InterpretedFunction] = {}  # by id of the library's JITFunction, which lives as long as triton


class Interpreted:
    """A generated module for the interpreter. Its functions are replaced by interpreted ones for good."""

    def __init__(self, module: ModuleType) -> None:
        for name, value in vars(module).items():
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))
        self._module = module

    def __call__(self, symbol: str, grid: tuple[int, int, int], values: Sequence[Any]) -> None:
        """Run one program after another over ``grid``; an empty grid runs nothing."""
        if 0 in grid:
            return
        # A processor makes infinities and NaNs in silence.
        with _interpreted_language(), np.errstate(all="ignore"):
            getattr(self._module, symbol)[grid](*values)


@contextmanager
def _interpreted_language() -> Iterator[None]:
    modules = [tl, tl.core, tl.math, tl.standard, tl.random]
    classes = [tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base]
    if hasattr(tl.core, "condition"):
        classes.append(tl.core.condition)
    before = [(owner, dict(vars(owner))) for owner in (*modules, *classes)]
    patch_tensor = triton_interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        # Triton 3.6 makes loop bounds of arrays with one element in a way that NumPy 2.4 refuses.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    builder = triton_interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def create_dot_by_rows(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        # A matrix unit computes all rows of a tile alike; some BLAS libraries do not, by a row's place in the tile.
        a, d = (TensorHandle(x.data[..., None, :], x.dtype.scalar) for x in (a, d))
        made = create_dot(self, a, TensorHandle(b.data[..., None, :, :], b.dtype.scalar), d, *rest)
        return TensorHandle(made.data[..., 0, :], made.dtype.scalar)

    triton_interpreter._patch_lang_tensor = patch_with_index
    builder.create_dot = create_dot_by_rows
    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, _library.setdefault(id(value), InterpretedFunction(value.fn)))
        yield
    finally:
        triton_interpreter._patch_lang_tensor = patch_tensor
        builder.create_dot = create_dot
        for owner, names in before:
            for name, value in list(vars(owner).items()):
                if name not in names:
                    # The interpreter adds names it needs to modules, and its rewritten functions keep using them.
                    if owner in classes:
                        delattr(owner, name)
                elif value is not names[name]:
                    setattr(owner, name, names[name])
