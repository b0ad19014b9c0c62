"""Linear layers as one tiled product with its epilogue, or as a product split along K and a sum in fixed order."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call, Refused
from graphserve.kernels.triton.gemv import gemv
from graphserve.kernels.triton.kernel import TL_DTYPES, KernelText, TritonKernel
from graphserve.kernels.triton.matmul import (
    DECODE_ROWS,
    EPILOGUE,
    PROCESSORS,
    PRODUCT,
    PRODUCTS,
    Product,
    Tile,
    choose_tile,
    clamped,
    dot_options,
    epilogue,
    item_size,
    k_mask,
    scalars_in,
)

# Row tiles that go over the weight together: their programs run at the same time and read it once from memory.
_GROUP_M = 8

_PRODUCT = """
rows = {rows}
in_group = GROUP_M * TILES_N
first = tl.program_id(0) // in_group * GROUP_M
tiles_m = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP_M)
place = tl.program_id(0) % in_group
offs_m = (first + place % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
offs_n = place // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
offs_k = {k_start}tl.arange(0, BLOCK_K)
# Rows and columns past the end read row 0: the loop needs no mask, and what it makes of them is not stored.
row = tl.where(offs_m < rows, offs_m, 0).to(tl.int64)
col = {col}
x_at = x + ({x_start})[:, None] + offs_k[None, :]
w_at = w + ({w_start})[None, :] + offs_k[:, None]
acc = tl.zeros((BLOCK_M, BLOCK_N), {acc_dtype})
# No constant, or the assembler would unroll every round: four times the code, and registers that spill.
end = tl.minimum(rows, 1) * {length}
for k in tl.range(0, end, BLOCK_K):
    a = tl.load(x_at + k{mask_a})
    b = tl.load(w_at + k{mask_b})
    acc = tl.dot(a, {b}, acc{options})
in_bounds = (offs_m < rows)[:, None] & (offs_n < N)[None, :]
"""

_REDUCE = """
rows = {rows}
offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
row = tl.where(offs_m < rows, offs_m, 0).to(tl.int64)
col = {col}
in_bounds = (offs_m < rows)[:, None] & (offs_n < N)[None, :]
acc = tl.zeros((BLOCK_M, BLOCK_N), {acc_dtype})
for split in tl.static_range(SPLITS):
    acc += tl.load(parts + (split * rows + row)[:, None] * N + col[None, :], mask=in_bounds, other=0)
"""


def linear(call: Call, target: str) -> TritonKernel | list[TritonKernel]:
    """``gs.linear`` and its quantized forms; the attribute ``product`` names the kernel, ``auto`` by default.

    ``auto``: one row is a GEMV, up to 16 rows a narrow GEMM; a plain linear of more rows is left to the library.
    """
    name = call.attrs.get(PRODUCT, "auto")
    if name not in PRODUCTS:
        raise Refused(f"{PRODUCT}={name!r} is unknown: use one of {', '.join(PRODUCTS)}")
    product = Product.of(call, target)
    if name == "gemv" or (name == "auto" and product.bucket_rows == 1):
        return gemv(product)
    if name == "split_k":
        return split_k(product)
    if name == "auto" and call.op == "linear" and product.bucket_rows > DECODE_ROWS:
        raise Refused(f"{product.bucket_rows} rows, more than {DECODE_ROWS}: torch.mm is the library's work")
    return gemm(product)


def gemm(product: Product) -> TritonKernel:
    """One program a tile of the result."""
    tile = _tile(product)
    text = KernelText(product.call)
    product.arguments(text, ("x", "w", *EPILOGUE))
    text.output("out", 0)
    text.scalar(*scalars_in(product.rows))
    body = _product_text(product, text, tile, product.k)
    grid = _num_tiles(product, tile)
    body += epilogue(product, text)
    return text.build(body, (grid, 1, 1), tile.num_warps, tile.num_stages)


def split_k(product: Product) -> list[TritonKernel]:
    """Partial products over parts of K into scratch memory, then their sum in order: equal bits on every run."""
    tile = _tile(product)
    splits, length = _splits(product, tile)
    rows, acc_dtype = product.rows, product.acc_dtype
    scratch = f"({rows})*{product.n * splits * 4}"
    text = KernelText(product.call, f"{product.call.op}_split_k")
    product.arguments(text, ("x", "w"))
    text.scratch("parts", acc_dtype)
    text.scalar(*scalars_in(rows))
    body = _product_text(product, text, tile, length)
    body += (
        "part = parts + (tl.program_id(1) * rows + row)[:, None] * N + offs_n[None, :]\n"
        "tl.store(part, acc, mask=in_bounds)\n"
    )
    partial = text.build(
        body, (_num_tiles(product, tile), splits, 1), tile.num_warps, tile.num_stages, scratch
    )  # fmt: skip

    text = KernelText(product.call, f"{product.call.op}_sum")
    product.arguments(text, EPILOGUE)
    text.output("out", 0)
    text.scratch("parts", acc_dtype)
    text.scalar(*scalars_in(rows))
    block_n = 128 if product.n >= 128 else tile.n
    text.constants(N=product.n, SPLITS=splits, BLOCK_M=4, BLOCK_N=block_n)
    body = _REDUCE.format(
        rows=rows, col=clamped("offs_n", "N", product.n % block_n == 0), acc_dtype=f"tl.{acc_dtype}"
    )  # fmt: skip
    body += epilogue(product, text)
    grid = (f"cdiv({rows}, 4)", -(-product.n // block_n), 1)
    return [partial, text.build(body, grid, 4, 1, scratch)]


def _tile(product: Product) -> Tile:
    item = item_size(product.x, product.w)
    return choose_tile(product.bucket_rows, product.n, product.k, item, product.target)


def _num_tiles(product: Product, tile: Tile) -> str:
    return f"cdiv({product.rows}, {tile.m})*{-(-product.n // tile.n)}"


def _splits(product: Product, tile: Tile) -> tuple[int, int]:
    """Parts of K, a power of two that fills the processors twice, and the length of each in whole blocks."""
    tiles = -(-product.bucket_rows // tile.m) * -(-product.n // tile.n)
    blocks = -(-product.k // tile.k)
    splits = 2
    while splits < 16 and tiles * splits < 2 * PROCESSORS[product.target] and 2 * splits <= blocks // 2:
        splits *= 2
    length = -(-blocks // splits) * tile.k
    return -(-product.k // length), length


def _product_text(product: Product, text: KernelText, tile: Tile, length: int) -> str:
    """The statements up to ``acc``; a ``length`` below K is one program's part of it, at ``program_id(1)``."""
    n, k = product.n, product.k
    is_split, is_even = length != k, k % (length if length != k else tile.k) == 0
    text.constants(
        N=n, K=k, W_STRIDE=product.w.int_stride(0), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        TILES_N=-(-n // tile.n), GROUP_M=_GROUP_M,
    )  # fmt: skip
    if is_split:
        text.constants(K_PART=length)
    x_dtype, w_dtype = product.x.dtype, product.w.dtype
    return _PRODUCT.format(
        rows=product.rows,
        k_start="tl.program_id(1) * K_PART + " if is_split else "",
        col=clamped("offs_n", "N", n % tile.n == 0),
        x_start=text.row_start("X", product.x),
        w_start=product.weight_offset("col"),
        acc_dtype=f"tl.{product.acc_dtype}",
        length="K_PART" if is_split else "K",
        mask_a=k_mask(product.x, "[None, :]", is_even),
        mask_b=k_mask(product.w, "[:, None]", is_even),
        # A quantized weight beside plain activations widens on the way to the matrix unit; its scale comes after.
        b="b" if x_dtype == w_dtype else f"b.to({TL_DTYPES[x_dtype]})",
        options=", out_dtype=tl.int32" if product.is_integer else dot_options(x_dtype, w_dtype),
    )
