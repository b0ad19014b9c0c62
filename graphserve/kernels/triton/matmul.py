"""What the matrix kernels share: the roles of a product's operands, tiles and their table, and pieces of text.

All of them compute ``out[m, n] = sum over k of x[m, k] * w[n, k]`` in fp32 (int32 where both operands are int8), with
the weight row-major ``[N, K]``, so that a tile of it is read along K in 128-bit loads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from graphserve.kernels.arg_spec import (
    ITEM_SIZES,
    ArgSpec,
    Call,
    Dim,
    Refused,
    require_unit_stride,
    row_layout,
)
from graphserve.kernels.triton.kernel import FLOAT_DTYPES, TL_DTYPES, KernelText, next_power_of_2, require_float

# Attributes that a lowering may add to an op's own. ``bucket_rows``: most rows of the steps that the launch is for; it
# chooses tiles, while every kernel is right for any number of rows (a decode step is assumed without it).
# ``product``: which kernel, one of PRODUCTS.
BUCKET_ROWS, PRODUCT = "bucket_rows", "product"
PRODUCTS = ("auto", "gemv", "gemm", "split_k")
DECODE_ROWS = 16

# Bytes of shared memory a program may use, and processors that a launch should occupy.
SHARED_MEMORY = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "cuda:100": 227 << 10, "hip:gfx942": 64 << 10}
PROCESSORS = {"cuda:80": 108, "cuda:90": 132, "cuda:100": 148, "hip:gfx942": 304}

ROLES = {
    "linear": ("x", "w", "bias"),
    "linear_w8": ("x", "w", "w_scale", "bias"),
    "linear_w8a8": ("x", "x_scale", "w", "w_scale", "bias"),
    "linear_add": ("x", "w", "bias", "residual"),
}

_SCALAR = re.compile(r"\b([TRS]|B_\d+)\b")


class Tile(NamedTuple):
    """Block sizes of one program and how it runs."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Product:
    """One linear launch: operands by role, sizes, and the number of rows as an expression."""

    call: Call
    target: str
    bucket_rows: int

    def __post_init__(self) -> None:
        x, w = self.spec("x"), self.spec("w")
        if x is None or w is None or len(w.shape) != 2:
            raise Refused(f"{self.call.op} needs x and a matrix as weight")
        for name, spec in (("x", x), ("weight", w)):
            require_matrix_dtype(name, spec, self.target)
            require_unit_stride(spec, name)
        if x.dtype in FLOAT_DTYPES and w.dtype in FLOAT_DTYPES and x.dtype != w.dtype:
            raise Refused(f"x is {x.dtype}, the weight {w.dtype}: they must be equal")
        if x.dtype not in FLOAT_DTYPES and x.dtype != w.dtype:
            raise Refused(f"x is {x.dtype}, the weight {w.dtype}: quantized operands must have one dtype")
        if x.int_dim(-1) != w.int_dim(1):
            raise Refused(f"x has {x.int_dim(-1)} columns, the weight {w.int_dim(1)}")
        require_float(("bias", self.spec("bias")), ("residual", self.spec("residual")), ("output", self.out))
        require_unit_stride(self.out, "output")

    @classmethod
    def of(cls, call: Call, target: str) -> Product:
        """The product of a launch; the bucket is left out of the call, so that buckets with one tile share a kernel."""
        attrs = {name: value for name, value in call.attrs.items() if name not in (BUCKET_ROWS, PRODUCT)}
        return cls(replace(call, attrs=attrs), target, int(call.attrs.get(BUCKET_ROWS, DECODE_ROWS)))

    def spec(self, role: str) -> ArgSpec | None:
        roles = ROLES[self.call.op]
        return self.call.optional(roles.index(role)) if role in roles else None

    @property
    def x(self) -> ArgSpec:
        return self.call.tensor(ROLES[self.call.op].index("x"), "x")

    @property
    def w(self) -> ArgSpec:
        return self.call.tensor(ROLES[self.call.op].index("w"), "weight")

    @property
    def out(self) -> ArgSpec:
        return self.call.outputs[0]

    @property
    def n(self) -> int:
        return self.w.int_dim(0)

    @property
    def k(self) -> int:
        return self.w.int_dim(1)

    @property
    def rows(self) -> Dim:
        """Number of rows, an expression in the step scalars."""
        return row_layout(self.x).count

    @property
    def is_integer(self) -> bool:
        """Both operands are int8, so that the sum is an exact int32."""
        return self.x.dtype == self.w.dtype == "int8"

    @property
    def acc_dtype(self) -> str:
        return "int32" if self.is_integer else "float32"

    def arguments(self, text: KernelText, roles: tuple[str, ...]) -> None:
        """Add the pointers of those of ``roles`` that the launch has, in op order."""
        for index, role in enumerate(ROLES[self.call.op]):
            if role in roles:
                text.pointer(role, index)

    def weight_offset(self, col: str) -> str:
        """Where a weight row starts: int64 only for weights that need it, half the registers otherwise."""
        return f"{col}.to(tl.int64) * W_STRIDE" if self.n * self.w.int_stride(0) >= 1 << 31 else f"{col} * W_STRIDE"


EPILOGUE = ("x_scale", "w_scale", "bias", "residual")


def epilogue(product: Product, text: KernelText, row: str = "row") -> str:
    """Statements from ``acc [BLOCK_M, BLOCK_N]`` to the stored result.

    They read ``row`` (int64 row numbers, 0 past the end), ``col``, ``offs_n`` and ``in_bounds``.
    """
    lines = ["value = acc.to(tl.float32)"] if product.is_integer else ["value = acc"]
    if product.spec("x_scale") is not None:
        lines.append(f"value *= tl.load(x_scale + {row})[:, None]")
    if product.spec("w_scale") is not None:
        lines.append("value *= tl.load(w_scale + col)[None, :]")
    if product.spec("bias") is not None:
        lines.append("value += tl.load(bias + col).to(tl.float32)[None, :]")
    if (residual := product.spec("residual")) is not None:
        start = text.row_start("RESIDUAL", residual, row)
        lines.append("# The sum of the model's two steps: the product is rounded first.")
        lines.append(f"value = value.to({TL_DTYPES[product.out.dtype]}).to(tl.float32)")
        lines.append(f"value += tl.load(residual + ({start})[:, None] + col[None, :], mask=in_bounds, other=0)")
    start = text.row_start("OUT", product.out, row)
    lines.append(f"tl.store(out + ({start})[:, None] + offs_n[None, :], value, mask=in_bounds)")
    return "\n".join(lines)


def require_matrix_dtype(name: str, spec: ArgSpec, target: str) -> None:
    """Refuse an operand that the target's matrix units or Triton cannot take."""
    if spec.dtype not in (*FLOAT_DTYPES, "int8", "float8_e4m3fn"):
        raise Refused(f"{name} is {spec.dtype}: products take {', '.join(FLOAT_DTYPES)}, int8 and float8_e4m3fn")
    if spec.dtype == "float8_e4m3fn" and target == "cuda:80":
        raise Refused(f"{name} is float8_e4m3fn, which {target} has no instructions for: int8 runs there")


def scalars_in(expression: Dim) -> tuple[str, ...]:
    """Step scalars of a row count, to be passed to the kernel."""
    return tuple(dict.fromkeys(_SCALAR.findall(str(expression))))


def item_size(*specs: ArgSpec) -> int:
    return max(ITEM_SIZES[spec.dtype] for spec in specs)


def choose_tile(rows: int, n: int, k: int, item: int, target: str, weight_tiles: int = 1) -> Tile:
    """Block sizes for a product of ``rows`` rows.

    Few rows are bound by the bandwidth of the weight: narrow tiles so that every processor streams, deep along K.
    Many rows are bound by the matrix units: square tiles. The numbers are estimates from these two bounds and the
    compiler's register counts, not measurements.

    Args:
        item: bytes of an element of the wider operand.
        weight_tiles: weight tiles read for one output tile (2 for gate and up).
    """
    is_hip = target.startswith("hip")
    if rows <= DECODE_ROWS:
        # Ampere's smaller shared memory keeps more programs with blocks of half the depth.
        tile = Tile(16, 16 if n < 32 * PROCESSORS[target] else 32, 128 if target == "cuda:80" else 256, 4, 4)
    elif rows <= 32:
        tile = Tile(32, 32 if n < 64 * PROCESSORS[target] else 64, 128, 4, 4)
    elif rows <= 64:
        tile = Tile(64, 64, 128, 4, 4)
    elif rows <= 512:
        tile = Tile(64, 128, 64, 4, 4)
    else:
        tile = Tile(128, 128, 64, 8, 4)
    # Two weight tiles make one accumulator twice as wide: registers allow 64 x 128.
    block_n = min(tile.n // (weight_tiles if tile.n > 64 else 1), max(16, next_power_of_2(n)))
    block_k = choose_block_k(k, tile.k * 2 // item, item)
    stages = 2 if is_hip else tile.num_stages
    # AMD's pipeline keeps one of the stages in registers.
    while (stages - is_hip) * (tile.m + weight_tiles * block_n) * block_k * item > SHARED_MEMORY[target] * 3 // 4:
        if stages > 2:
            stages -= 1
        else:
            block_k //= 2
    # No more threads than 128-bit loads in a block: they would load less each.
    loads = max(tile.m, block_n) * block_k * item // 16
    return Tile(tile.m, block_n, block_k, max(1, min(tile.num_warps, loads // (64 if is_hip else 32))), stages)


def choose_block_k(k: int, largest: int, item: int) -> int:
    """The largest power of two up to ``largest`` that divides K, which then needs no mask; 32 or a cache line at least.

    Where even that does not divide K, blocks are masked and large again.
    """
    least = max(32, 64 // item)
    block = min(largest, max(least, next_power_of_2(k)))
    exact = block
    while exact > least and k % exact:
        exact //= 2
    return exact if k % exact == 0 else block


def k_mask(spec: ArgSpec, place: str, is_even: bool) -> str:
    """Keywords of a load whose blocks may reach past K; ``place`` broadcasts the mask over the tile."""
    zero = "0" if spec.dtype == "int8" else "0.0"
    return "" if is_even else f", mask=(offs_k + k < K){place}, other={zero}"


def dot_options(*dtypes: str) -> str:
    """Keywords of ``tl.dot``: fp32 operands stay fp32; fp8 sums leave Hopper's 14-bit accumulator after 128."""
    if "float32" in dtypes:
        return ', input_precision="ieee"'
    return ", max_num_imprecise_acc=128" if set(dtypes) == {"float8_e4m3fn"} else ""


def clamped(name: str, limit: str, is_even: bool) -> str:
    """Indices past the end become 0: the loop needs no mask, and what it makes of them is not stored."""
    return name if is_even else f"tl.where({name} < {limit}, {name}, 0)"
