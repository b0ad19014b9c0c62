"""What a generated kernel is: tensor descriptions in, one C++ function with literal dimensions out."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

import msgspec

Dim = int | str

CPP_TYPES = {"float32": "float", "bfloat16": "bf16", "int64": "int64_t", "int32": "int32_t"}
ITEM_SIZES = {"float32": 4, "bfloat16": 2, "int64": 8, "int32": 4}

# Step scalars by name, as the kernels' second argument holds them; B_0, B_1, ... follow.
_SCALARS = {"T": "s[0]", "R": "s[1]", "S": "s[2]"}
NUM_THREADS = "s[3]"
_TOKEN = re.compile(r"\s*(\d+|[A-Z](?:_\d+)?|//|[-+*()])")


class Refused(Exception):
    """A generator cannot express its arguments; :func:`graphserve.kernels.cpu.generate` returns it as a Refusal."""


class Refusal(msgspec.Struct, frozen=True):
    """Why no C++ kernel was generated; the launch stays with its reference."""

    reason: str


class ArgSpec(msgspec.Struct, frozen=True):
    """One tensor argument.

    ``shape`` and ``strides`` hold ints and affine strings in T, R, S and B_g (``"T"``, ``"4*T"``); ``strides`` count
    elements, None means contiguous.
    """

    dtype: str
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...] | None = None

    @property
    def cpp_type(self) -> str:
        """The C++ name of the element type."""
        if self.dtype not in CPP_TYPES:
            raise Refused(f"dtype {self.dtype} has no C++ kernels: only {', '.join(CPP_TYPES)}")
        return CPP_TYPES[self.dtype]

    def int_dim(self, axis: int) -> int:
        """A dimension that must be known when the kernel is generated."""
        size = self.shape[axis]
        if not isinstance(size, int):
            raise Refused(f"dimension {axis} of shape {self.shape} must be a constant")
        return size

    def stride(self, axis: int) -> Dim:
        """Stride of one dimension in elements, computed for a contiguous tensor where none is given."""
        if self.strides is not None:
            return self.strides[axis]
        return product(self.shape[axis % len(self.shape) + 1 :])

    def int_stride(self, axis: int) -> int:
        """A stride that must be known when the kernel is generated."""
        stride = self.stride(axis)
        if not isinstance(stride, int):
            raise Refused(f"stride {axis} of shape {self.shape} must be a constant, got {stride!r}")
        return stride


class CppKernel(msgspec.Struct, frozen=True):
    """One generated function ``void symbol(void* const* p, const int64_t* s)``.

    Invariant: ``key`` is the SHA-256 of the source (with the symbol left out), so equal work has one kernel.
    """

    symbol: str
    key: str
    isa: str
    families: tuple[str, ...]  # template files its function instantiates, in order
    entry: str  # comment block and function

    @property
    def source(self) -> str:
        """The complete translation unit of this kernel alone."""
        return translation_unit([self])


@dataclass(frozen=True)
class Rows:
    """Leading dimensions of a tensor seen as one list of rows."""

    count: str  # C++ expression
    cpp_type: str  # Rows<INNER, OUTER_STRIDE, INNER_STRIDE>


def product(dims: tuple[Dim, ...]) -> Dim:
    """Product of dimensions, an int where all are ints."""
    number = 1
    symbols: list[str] = []
    for dim in dims:
        if isinstance(dim, int):
            number *= dim
        else:
            symbols.append(f"({dim})")
    if not symbols:
        return number
    return "*".join(symbols + ([str(number)] if number != 1 else []))


def cpp_dim(dim: Dim) -> str:
    """The C++ expression of a dimension: ``"4*T"`` becomes ``4*s[0]``."""
    if isinstance(dim, int):
        return str(dim)
    out, at = [], 0
    while at < len(dim):
        match = _TOKEN.match(dim, at)
        if match is None:
            raise Refused(f"dimension {dim!r} is not an expression in T, R, S and B_g")
        token, at = match.group(1), match.end()
        if token[0].isalpha():
            out.append(f"s[{4 + int(token[2:])}]" if token.startswith("B_") else _scalar(token, dim))
        else:
            out.append("/" if token == "//" else token)
    return "(" + "".join(out) + ")"


def _scalar(token: str, dim: str) -> str:
    if token not in _SCALARS:
        raise Refused(f"dimension {dim!r} names {token}, which is not one of T, R, S, B_g")
    return _SCALARS[token]


def rows_of(spec: ArgSpec, trailing: int = 1) -> Rows:
    """View all but the last ``trailing`` dimensions as rows with at most two strides.

    Raises:
        Refused: the leading dimensions need more than two strides, or one with an unknown size is not outermost.
    """
    merged: list[tuple[Dim, int]] = []  # (size, stride), outermost first
    for axis in range(len(spec.shape) - trailing):
        size = spec.shape[axis]
        if size == 1:
            continue
        stride = spec.int_stride(axis)
        if merged and isinstance(size, int) and merged[-1][1] == size * stride:
            outer = merged[-1][0]
            merged[-1] = (outer * size if isinstance(outer, int) else product((outer, size)), stride)
        else:
            merged.append((size, stride))
    count = product(tuple(size for size, _ in merged))
    if not merged:
        return Rows("1", "Rows<1, 0, 0>")
    if len(merged) == 1:
        return Rows(cpp_dim(count), f"Rows<1, {merged[0][1]}, 0>")
    inner, inner_stride = merged[1]
    if len(merged) > 2 or not isinstance(inner, int):
        raise Refused(f"shape {spec.shape} with strides {spec.strides} is not a list of rows with two strides")
    return Rows(cpp_dim(count), f"Rows<{inner}, {merged[0][1]}, {inner_stride}>")


def require_unit_stride(spec: ArgSpec, name: str) -> None:
    """Refuse a tensor whose last dimension is not contiguous."""
    if spec.shape[-1] != 1 and spec.stride(-1) != 1:
        raise Refused(f"{name} must be contiguous in its last dimension, got strides {spec.strides}")


def require_same_dtype(*specs: tuple[str, ArgSpec]) -> str:
    """The C++ type all given tensors share, which must be a float type."""
    name, first = specs[0]
    if first.dtype not in ("float32", "bfloat16"):
        raise Refused(f"{name} is {first.dtype}: C++ kernels take float32 and bfloat16")
    for other, spec in specs[1:]:
        if spec.dtype != first.dtype:
            raise Refused(f"{other} is {spec.dtype} where {name} is {first.dtype}: they must be equal")
    return first.cpp_type


def cpp_float(value: float) -> str:
    """A float attribute as a C++ literal."""
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{float(value)!r}f"


def pointer(spec: ArgSpec | None, index: int, const: bool = True, cpp_type: str | None = None) -> str:
    """Pointer argument ``index`` cast to the tensor's type; absent tensors become null."""
    name = cpp_type or (spec.cpp_type if spec is not None else "float")
    qualified = f"const {name}" if const else name
    return f"static_cast<{qualified}*>({f'p[{index}]' if spec is not None else 'nullptr'})"


@cache
def template(name: str) -> str:
    """Text of one template file."""
    return (resources.files(__package__) / "templates" / f"{name}.h").read_text()


def make_kernel(name: str, isa: str, families: tuple[str, ...], comment: str, body: str) -> CppKernel:
    """Wrap the statements of one kernel into an entry function named by the hash of everything it depends on."""
    text = "\n".join([isa, *(template(family) for family in families), comment, body])
    key = hashlib.sha256(text.encode()).hexdigest()
    symbol = f"gs_{name}_{key[:16]}"
    notes = "\n".join(f"//   {line}" for line in comment.splitlines())
    entry = (
        f"// generator: graphserve.kernels.cpu, kernel {name}\n//   key: {key}\n//   isa: {isa}\n{notes}\n"
        f'extern "C" __attribute__((visibility("default"))) void {symbol}(void* const* p, const int64_t* s) {{\n'
        f"{body}\n}}\n"
    )
    return CppKernel(symbol=symbol, key=key, isa=isa, families=families, entry=entry)


def translation_unit(kernels: list[CppKernel]) -> str:
    """One C++ file with every template once and the entries of all ``kernels`` (one ISA level)."""
    from graphserve.kernels.cpu.isa import ISA_LEVELS

    levels = {kernel.isa for kernel in kernels}
    if len(levels) != 1:
        raise ValueError(f"one translation unit holds one ISA level, got {sorted(levels)}")
    level = ISA_LEVELS[levels.pop()]
    families = list(dict.fromkeys(family for kernel in kernels for family in kernel.families))
    head = f"#define GS_WIDTH {level.width}\n#define GS_DPBF16 {int(level.dot_bf16)}\n"
    names = "\n".join(f"// kernel {kernel.symbol}, key {kernel.key}" for kernel in kernels)
    parts = [f"// Generated by graphserve.kernels.cpu, isa {level.name}\n{names}\n{head}"]
    parts += [template(family) for family in families]
    parts += [kernel.entry for kernel in kernels]
    return "\n".join(parts)
