"""What a generated Triton kernel is: tensor descriptions in, the text of one ``@triton.jit`` function out.

Nothing here imports triton. A kernel's text is complete: every size, stride and float attribute stands in it as a
``tl.constexpr`` of the module, so that it can be read, hashed and compiled without the launch it was made for.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Mapping, Sequence

import msgspec

from graphserve.kernels.arg_spec import ITEM_SIZES, ArgSpec, Call, Dim, Refused, row_layout

TRITON_TYPES = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "i1",
}  # fmt: skip
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")

# Triton's own name of a torch dtype, as the text of a kernel writes it.
TL_DTYPES = {
    "float32": "tl.float32", "bfloat16": "tl.bfloat16", "float16": "tl.float16",
    "float8_e4m3fn": "tl.float8e4nv", "float8_e5m2": "tl.float8e5",
    "int64": "tl.int64", "int32": "tl.int32", "int16": "tl.int16", "int8": "tl.int8", "uint8": "tl.uint8",
    "bool": "tl.int1",
}  # fmt: skip

Constexpr = int | float | bool | str


class TritonArgument(msgspec.Struct, frozen=True):
    """One run-time argument.

    Attributes:
        name: parameter of the function.
        type: Triton's type, ``*bf16``, ``*i64``, ``i32``.
        source: where its value comes from: an int is the place in the launch's tensor arguments followed by its
            outputs; a string is a step scalar (``T``, ``R``, ``S``, ``B_0``) or ``scratch``.
        aligned: the pointer is a multiple of 16 bytes.
    """

    name: str
    type: str
    source: int | str
    aligned: bool = True


class TritonKernel(msgspec.Struct, frozen=True):
    """One generated function and how it is launched.

    Invariant: ``key`` is the SHA-256 of everything that decides the compiled code (source, constants, argument types,
    warps and stages), so equal work has one kernel.

    Attributes:
        symbol: name of the function.
        source: a module with this function, its constants and the imports both need.
        arguments: run-time arguments in order: tensors in op order, then outputs, scratch, step scalars.
        scalars: the step scalars among them.
        constexprs: the module's constants by name.
        grid: three expressions in T, R, S, B_g and ``cdiv(a, b)``.
        scratch: bytes of scratch memory, an expression like those of the grid.
        scratch_zeroed: the scratch memory must be zero before the first launch, and is zero after each.
    """

    symbol: str
    key: str
    source: str
    arguments: tuple[TritonArgument, ...]
    constexprs: dict[str, Constexpr]
    grid: tuple[Dim, Dim, Dim]
    num_warps: int
    num_stages: int = 1
    scratch: Dim = 0
    scratch_zeroed: bool = False

    @property
    def scalars(self) -> tuple[str, ...]:
        """Step scalars that the function takes, in order."""
        return tuple(str(a.source) for a in self.arguments if not a.type.startswith("*"))

    def source_for(self, sources: Sequence[str]) -> str:
        """The source with the captured nodes of one launch named in its comment block."""
        head, _, body = self.source.partition("\n\n")
        return f"{head}\n" + comment(f"stands for: {', '.join(sources)}") + f"\n\n{body}"


def comment(text: str, indent: str = "") -> str:
    """Text as comment lines of at most 110 columns."""
    lines = (wrapped for line in text.splitlines() for wrapped in textwrap.wrap(line, 105, subsequent_indent="  "))
    return "\n".join(f"# {indent}{line}" for line in lines)


def triton_type(spec: ArgSpec) -> str:
    """Triton's name of the element type.

    Raises:
        Refused: there is none.
    """
    if spec.dtype not in TRITON_TYPES:
        raise Refused(f"dtype {spec.dtype} has no Triton kernels: only {', '.join(TRITON_TYPES)}")
    return TRITON_TYPES[spec.dtype]


def require_float(*specs: tuple[str, ArgSpec | None]) -> None:
    """Refuse a tensor that is neither fp32, bf16 nor fp16."""
    for name, spec in specs:
        if spec is not None and spec.dtype not in FLOAT_DTYPES:
            raise Refused(f"{name} is {spec.dtype}: this kernel takes {', '.join(FLOAT_DTYPES)}")


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below ``number``, 1 at least."""
    return 1 << max(0, number - 1).bit_length()


class KernelText:
    """Collects one kernel while its family's generator writes it.

    Args:
        call: the launch.
        name: what the symbol starts with, after ``gs_``; the op's name by default.
    """

    def __init__(self, call: Call, name: str | None = None) -> None:
        self.call = call
        self.name = name or call.op
        self.constexprs: dict[str, Constexpr] = {}
        self._arguments: list[TritonArgument] = []
        self._helpers: list[str] = []

    def pointer(self, name: str, index: int, as_type: str | None = None) -> bool:
        """Add argument or output ``index`` (outputs count after the arguments) as ``name``; False if it is absent.

        ``as_type``: Triton type of its elements where the kernel reads or writes their bits under another type.
        """
        tensors = [*self.call.args, *self.call.outputs]
        spec = tensors[index]
        if spec is None:
            return False
        aligned = spec.alignment % 16 == 0
        self._arguments.append(TritonArgument(name, f"*{as_type or triton_type(spec)}", index, aligned))
        return True

    def output(self, name: str, index: int, as_type: str | None = None) -> None:
        """Add output ``index`` as ``name``."""
        self.pointer(name, len(self.call.args) + index, as_type)

    def scratch(self, name: str, dtype: str) -> None:
        """Add the launch's scratch memory as a pointer to ``dtype``."""
        self._arguments.append(TritonArgument(name, f"*{TRITON_TYPES[dtype]}", "scratch"))

    def scalar(self, *names: str) -> None:
        """Add step scalars; called after all pointers."""
        self._arguments += [TritonArgument(name, "i32", name) for name in names]

    def constants(self, **values: Constexpr) -> None:
        """Add constants by name."""
        self.constexprs.update(values)

    def helper(self, text: str) -> None:
        """Add another ``@triton.jit`` function or constant that the kernel's body uses, once."""
        if text not in self._helpers:
            self._helpers.append(text)

    def row_start(self, name: str, spec: ArgSpec, row: str = "row", trailing: int = 1) -> str:
        """An int64 expression of the element at which a tensor's row starts; adds the strides it needs as constants.

        Args:
            name: prefix of the constants, for example ``X``.
            spec: the tensor.
            row: an int64 expression.
            trailing: dimensions inside a row.
        """
        layout = row_layout(spec, trailing)
        self.constants(**{f"{name}_STRIDE": layout.outer_stride})
        if layout.inner == 1:
            return f"{row} * {name}_STRIDE"
        self.constants(**{f"{name}_INNER": layout.inner, f"{name}_INNER_STRIDE": layout.inner_stride})
        return f"({row} // {name}_INNER) * {name}_STRIDE + ({row} % {name}_INNER) * {name}_INNER_STRIDE"

    def build(
        self,
        body: str,
        grid: tuple[Dim, Dim, Dim],
        num_warps: int,
        num_stages: int = 1,
        scratch: Dim = 0,
        scratch_zeroed: bool = False,
    ) -> TritonKernel:
        """The finished kernel; ``body`` holds the statements of the function, without indentation."""
        parameters = [a.name for a in self._arguments]
        do_not_specialize = [a.name for a in self._arguments if not a.type.startswith("*")]
        constants = "\n".join(f"{name} = tl.constexpr({value!r})" for name, value in self.constexprs.items())
        decorator = f"@triton.jit(do_not_specialize={do_not_specialize})" if do_not_specialize else "@triton.jit"
        decorator = decorator.replace("'", '"')
        text = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
        helpers = "".join(textwrap.dedent(h).strip("\n") + "\n\n\n" for h in self._helpers)
        types = ", ".join(f"{a.name}: {a.type}{'' if a.aligned else ' unaligned'}" for a in self._arguments)
        notes = _notes(self.call)
        launch = f"launch: grid {list(grid)}, {num_warps} warps, {num_stages} stages, scratch {scratch} bytes"
        tail = "\n".join([types, notes, launch, constants, helpers, text])
        key = hashlib.sha256(f"{self.name}\n{tail}".encode()).hexdigest()
        symbol = f"gs_{self.name}_{key[:16]}"
        head = comment(f"generator: graphserve.kernels.triton, kernel {self.name}\nkey: {key}\n{notes}\n{launch}")
        source = (
            f"{head}\n\nimport triton\nimport triton.language as tl\n\n{constants}\n\n\n{helpers}"
            f"{decorator}\ndef {symbol}({', '.join(parameters)}):\n{text}\n"
        )
        return TritonKernel(
            symbol, key, source, tuple(self._arguments), dict(self.constexprs), grid, num_warps, num_stages, scratch,
            scratch_zeroed,
        )  # fmt: skip


def _notes(call: Call) -> str:
    """The launch in words: its tensors and attributes."""
    labelled = [(f"argument {i}", spec) for i, spec in enumerate(call.args)]
    labelled += [(f"output {i}", spec) for i, spec in enumerate(call.outputs)]
    lines = [f"{label}: {_describe(spec)}" for label, spec in labelled]
    return "\n".join(lines + [f"{name} = {value!r}" for name, value in call.attrs.items()])


def _describe(spec: ArgSpec | None) -> str:
    if spec is None:
        return "absent"
    strides = "contiguous" if spec.strides is None else f"strides {list(spec.strides)}"
    return f"{spec.dtype} {list(spec.shape)} {strides}"


def vector_elements(specs: Mapping[str, ArgSpec]) -> int:
    """Elements of the widest tensor type in one 128-bit access."""
    return 16 // max(ITEM_SIZES[spec.dtype] for spec in specs.values())
