"""What a generated kernel is: tensor descriptions in, one C++ function with literal dimensions out."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

import msgspec

from graphserve.kernels.arg_spec import ArgSpec, Dim, Refused, row_layout

CPP_TYPES = {"float32": "float", "bfloat16": "bf16", "int64": "int64_t", "int32": "int32_t"}

# Step scalars by name, as the kernels' second argument holds them; B_0, B_1, ... follow.
_SCALARS = {"T": "s[0]", "R": "s[1]", "S": "s[2]"}
NUM_THREADS = "s[3]"
_TOKEN = re.compile(r"\s*(\d+|[A-Z](?:_\d+)?|//|[-+*()])")


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


def cpp_type_of(spec: ArgSpec) -> str:
    """The C++ name of the element type."""
    if spec.dtype not in CPP_TYPES:
        raise Refused(f"dtype {spec.dtype} has no C++ kernels: only {', '.join(CPP_TYPES)}")
    return CPP_TYPES[spec.dtype]


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
    """View all but the last ``trailing`` dimensions as rows, see :func:`graphserve.kernels.arg_spec.row_layout`."""
    layout = row_layout(spec, trailing)
    return Rows(cpp_dim(layout.count), f"Rows<{layout.inner}, {layout.outer_stride}, {layout.inner_stride}>")


def require_same_dtype(*specs: tuple[str, ArgSpec]) -> str:
    """The C++ type all given tensors share, which must be a float type."""
    name, first = specs[0]
    if first.dtype not in ("float32", "bfloat16"):
        raise Refused(f"{name} is {first.dtype}: C++ kernels take float32 and bfloat16")
    for other, spec in specs[1:]:
        if spec.dtype != first.dtype:
            raise Refused(f"{other} is {spec.dtype} where {name} is {first.dtype}: they must be equal")
    return cpp_type_of(first)


def cpp_float(value: float) -> str:
    """A float attribute as a C++ literal."""
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{float(value)!r}f"


def pointer(spec: ArgSpec | None, index: int, const: bool = True, cpp_type: str | None = None) -> str:
    """Pointer argument ``index`` cast to the tensor's type; absent tensors become null."""
    name = cpp_type or (cpp_type_of(spec) if spec is not None else "float")
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
