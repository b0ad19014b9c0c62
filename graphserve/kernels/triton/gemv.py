"""One row times a matrix without the matrix units: bound by the bandwidth of the weight, loads are all that counts."""

from __future__ import annotations

from graphserve.kernels.triton.kernel import KernelText, TritonKernel, next_power_of_2
from graphserve.kernels.triton.matmul import (
    EPILOGUE,
    PROCESSORS,
    Product,
    choose_block_k,
    clamped,
    epilogue,
    item_size,
    k_mask,
    scalars_in,
)

# Weights that a program asks for at a time, 4 KiB of one row: two 128-bit loads of bf16 a thread. More programs with
# less to do each keep the memory busiest, from 6144 to 128256 rows of the weight (benchmarks/gpu_tune.py, H200).
_TILE_ELEMENTS = 2048
_TILE_BYTES = 4096
_LEAST_BYTES = 512  # of a row: less is no 128-bit load for each thread of a warp
_NUM_WARPS = 4

_BODY = """
offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
offs_k = tl.arange(0, BLOCK_K)
row = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
# Columns past the end read row 0 of the weight, and are not stored.
col = {col}
# Each thread loads its own part of x, as wide as the weight's tile: it comes from L1, and none waits for another.
x_at = x + {x_start} + offs_k[None, :] + tl.zeros((BLOCK_N, 1), tl.int32)
w_at = w + ({w_start})[:, None] + offs_k[None, :]
# One sum a place of the tile; threads add up among themselves once, after the loop.
sums = tl.zeros((BLOCK_N, BLOCK_K), {acc_dtype})
for k in tl.range(0, K, BLOCK_K):
    a = tl.load(x_at + k{mask_a}).to({acc_dtype})
    b = tl.load(w_at + k{mask_b}).to({acc_dtype})
    sums += a * b
acc = tl.sum(sums, 1)[None, :]
in_bounds = (offs_n < N)[None, :]
"""


def gemv(product: Product) -> TritonKernel:
    """A program computes ``BLOCK_N`` results of one row; more rows are more programs, which read the weight again."""
    n, k, item = product.n, product.k, item_size(product.w)
    block_k = choose_block_k(k, _TILE_BYTES // item, item)
    if block_k * item < _LEAST_BYTES:
        block_k = min(_TILE_BYTES // item, next_power_of_2(k))  # masked, where whole blocks would be too short
    block_n = max(1, _TILE_ELEMENTS // block_k)
    while block_n > 1 and -(-n // block_n) < 2 * PROCESSORS[product.target]:
        block_n //= 2
    text = KernelText(product.call, f"{product.call.op}_gemv")
    product.arguments(text, ("x", "w", *EPILOGUE))
    text.output("out", 0)
    text.scalar(*scalars_in(product.rows))
    text.constants(N=n, K=k, W_STRIDE=product.w.int_stride(0), BLOCK_N=block_n, BLOCK_K=block_k)
    is_even = k % block_k == 0
    body = _BODY.format(
        col=clamped("offs_n", "N", n % block_n == 0),
        x_start=text.row_start("X", product.x, "tl.program_id(1).to(tl.int64)"),
        w_start=product.weight_offset("col"),
        acc_dtype=f"tl.{product.acc_dtype}",
        mask_a=k_mask(product.x, "[None, :]", is_even),
        mask_b=k_mask(product.w, "[None, :]", is_even),
    )
    return text.build(
        body + epilogue(product, text),
        (-(-n // block_n), product.rows, 1),
        _num_warps(block_n, block_k, product.target),
    )


def _num_warps(block_n: int, block_k: int, target: str) -> int:
    # The addresses of several rows take the registers of a second load a thread; a warp of gfx942 has 64 lanes.
    has_one_load = block_n > 1 and block_n * block_k == _TILE_ELEMENTS and not target.startswith("hip")
    return 2 * _NUM_WARPS if has_one_load else _NUM_WARPS
