"""Routed experts as four kernels: pairs put in order by expert, two grouped products, and the weighted sum.

A pair is one (row, choice) of the router. The first kernel gives each expert whole tiles of ``BLOCK_M`` pairs, so that
the products run over a list of tiles. Grids are the bucket's limits, ``min(pairs, cdiv(pairs, BLOCK_M) + E)`` tiles;
programs of unused tiles end at once, and the host reads nothing. No atomic operations: every run gives the same bits.

Scratch memory, in this order: hidden ``[pairs, I]``, terms ``[pairs, H]``, pair of each place ``[tiles * BLOCK_M]``,
expert of each tile ``[tiles]``.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphserve.kernels.arg_spec import ITEM_SIZES, ArgSpec, Call, Dim, Refused, require_unit_stride, row_layout
from graphserve.kernels.triton.expressions import activation
from graphserve.kernels.triton.kernel import TL_DTYPES, KernelText, TritonKernel, next_power_of_2, require_float
from graphserve.kernels.triton.matmul import (
    BUCKET_ROWS,
    DECODE_ROWS,
    Tile,
    choose_tile,
    clamped,
    dot_options,
    k_mask,
    require_matrix_dtype,
    scalars_in,
)

X, IDS, WEIGHTS, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS = range(7)
CLAMPED_SWIGLU = "swiglu_clamp"

_ALIGN = """
expert = tl.program_id(0)
{places}
bins = tl.arange(0, BINS)
counts = tl.zeros((BINS,), tl.int32)
for start in tl.range(0, pairs, CHUNK):
    pair = start + tl.arange(0, CHUNK)
    ids = tl.load(topk_ids + pair, mask=pair < pairs, other=-1)
    # The last bin takes pairs past the end and ids that name no expert here.
    counts += tl.histogram(tl.where((ids >= 0) & (ids < E), ids, BINS - 1).to(tl.int32), BINS)
tiles = tl.where(bins < E, (counts + BLOCK_M - 1) // BLOCK_M, 0)
first = tl.sum(tl.where(bins < expert, tiles, 0), 0)
end = first + tl.sum(tl.where(bins == expert, tiles, 0), 0)
for tile in tl.range(first, end):
    tl.store(expert_of_tile + tile, expert)
place = first * BLOCK_M
for start in tl.range(0, pairs, CHUNK):
    pair = start + tl.arange(0, CHUNK)
    is_mine = tl.load(topk_ids + pair, mask=pair < pairs, other=-1) == expert
    rank = tl.cumsum(is_mine.to(tl.int32), 0) - 1
    tl.store(order + place + rank, pair, mask=is_mine)
    place += tl.sum(is_mine.to(tl.int32), 0)
rest = place + tl.arange(0, BLOCK_M)
tl.store(order + rest, pairs + tl.zeros((BLOCK_M,), tl.int32), mask=rest < end * BLOCK_M)
if expert == E - 1:
    for tile in tl.range(end, num_tiles, BLOCK_M):
        unused = tile + tl.arange(0, BLOCK_M)
        tl.store(expert_of_tile + unused, tl.full((BLOCK_M,), -1, tl.int32), mask=unused < num_tiles)
"""

_PRODUCT = """
{places}
tile = tl.program_id(0)
expert = tl.load(expert_of_tile + tile)
if expert < 0:
    return
pair = tl.load(order + tile * BLOCK_M + tl.arange(0, BLOCK_M))
is_pair = pair < pairs
# Places without a pair read pair 0, columns past the end column 0; neither is stored.
pair = tl.where(is_pair, pair, 0).to(tl.int64)
offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
offs_k = tl.arange(0, BLOCK_K)
{columns}
x_at = x + ({x_start})[:, None] + offs_k[None, :]
w_at = w + expert.to(tl.int64) * W_EXPERT + (col * W_N)[None, :] + (offs_k * W_K)[:, None]
{before}
acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
for k in tl.range(0, K, BLOCK_K):
    a = tl.load(x_at + k{mask_a})
    b = tl.load(w_at + k * W_K{mask_b})
{scale}    acc = tl.dot(a, b, acc{options})
{bias}
"""

_SUM = """
{places}
row = tl.program_id(0).to(tl.int64)
offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
total = tl.zeros((BLOCK_N,), tl.float32)
for choice in tl.static_range(TOP_K):
    pair = row * TOP_K + choice
    expert = tl.load(topk_ids + pair)
    width = tl.where((expert >= 0) & (expert < E), H, 0)
    total += tl.load(terms + pair * H + offs_n, mask=offs_n < width, other=0).to(tl.float32)
tl.store(out + {out_start} + offs_n, total, mask=offs_n < H)
"""


@dataclass(frozen=True)
class _Experts:
    """Sizes and places of one launch."""

    call: Call
    target: str
    bucket_rows: int

    @property
    def rows(self) -> Dim:
        return row_layout(self.call.tensor(X, "x")).count

    @property
    def dtype(self) -> str:
        return self.call.tensor(X, "x").dtype

    @property
    def top_k(self) -> int:
        return self.call.tensor(IDS, "topk_ids").int_dim(-1)

    @property
    def num_experts(self) -> int:
        return self.call.tensor(GATE_UP, "gate_up").int_dim(0)

    @property
    def hidden(self) -> int:
        """H, columns of x."""
        return self.call.tensor(X, "x").int_dim(-1)

    @property
    def inner(self) -> int:
        """I, columns between the two products."""
        return self.call.tensor(DOWN, "down").int_dim(1 if self.is_transposed else 2)

    @property
    def is_transposed(self) -> bool:
        return bool(self.call.attr("transposed"))

    @property
    def has_gate(self) -> bool:
        return bool(self.call.attrs.get("has_gate", True))

    @property
    def weights_on_input(self) -> bool:
        return bool(self.call.attrs.get("weights_on_input", False))

    @property
    def term_dtype(self) -> str:
        """The wider of x's and the router's dtype, in which each expert's output is weighted."""
        router = self.call.tensor(WEIGHTS, "topk_weights").dtype
        return self.dtype if router == self.dtype else "float32"

    @property
    def rows_per_expert(self) -> int:
        return max(1, -(-self.bucket_rows * self.top_k // self.num_experts))

    @property
    def block_m(self) -> int:
        return self.tile(self.hidden, self.inner, 1).m

    def tile(self, n: int, k: int, weight_tiles: int) -> Tile:
        """The tile of one of the products; ``weight_tiles`` is 2 for gate and up."""
        tile = choose_tile(self.rows_per_expert, n, k, ITEM_SIZES[self.dtype], self.target, weight_tiles)
        if not self.is_transposed:
            return tile
        # Weights stored [in, out] are read along N: 128 bytes at least, and less deep along K for it.
        wide = max(tile.n, min(64 // weight_tiles, next_power_of_2(n)))
        return tile._replace(n=wide, k=max(32, tile.k * tile.n // wide))

    @property
    def num_tiles(self) -> str:
        pairs = f"({self.rows})*{self.top_k}"
        return f"min({pairs}, cdiv({pairs}, {self.block_m})+{self.num_experts})"

    @property
    def pair_bytes(self) -> tuple[int, int]:
        """Scratch bytes of a pair's hidden row and of its term, padded so that what follows them is aligned."""
        sizes = (self.inner * ITEM_SIZES[self.dtype], self.hidden * ITEM_SIZES[self.term_dtype])
        return -(-sizes[0] // 16) * 16, -(-sizes[1] // 16) * 16

    @property
    def scratch(self) -> str:
        return f"({self.rows})*{self.top_k * sum(self.pair_bytes)}+({self.num_tiles})*{4 * self.block_m + 4}"

    def text(self, name: str) -> KernelText:
        text = KernelText(self.call, f"moe_{name}")
        text.constants(E=self.num_experts, TOP_K=self.top_k)
        return text

    def places(self, text: KernelText, *names: str) -> str:
        """Statements that define ``pairs``, ``num_tiles`` and, as pointers, those of the scratch parts in ``names``."""
        hidden, term = self.pair_bytes
        lines = [f"pairs = {self.rows} * TOP_K"]
        if "hidden" in names:
            text.scratch("hidden", self.dtype)
        if "terms" in names:
            text.scratch("scratch_terms", self.term_dtype)
            text.constants(TERMS_AT=hidden // ITEM_SIZES[self.term_dtype])
            lines.append("terms = scratch_terms + pairs.to(tl.int64) * TERMS_AT")
        if "order" in names:
            text.scratch("scratch_order", "int32")
            text.constants(ORDER_AT=(hidden + term) // 4, BLOCK_M=self.block_m)
            lines.append("num_tiles = tl.minimum(pairs, tl.cdiv(pairs, BLOCK_M) + E)")
            lines.append("order = scratch_order + pairs.to(tl.int64) * ORDER_AT")
            lines.append("expert_of_tile = order + num_tiles * BLOCK_M")
        return "\n".join(lines)


def moe(call: Call, target: str) -> list[TritonKernel]:
    """The four kernels of ``gs.moe``; ``bucket_rows`` among the attributes chooses the tile."""
    attrs = {name: value for name, value in call.attrs.items() if name != BUCKET_ROWS}
    experts = _Experts(
        Call(call.op, attrs, call.args, call.outputs), target, int(call.attrs.get(BUCKET_ROWS, DECODE_ROWS))
    )
    _check(experts)
    return [_align(experts), _gate_up(experts), _down(experts), _sum(experts)]


def _check(experts: _Experts) -> None:
    call = experts.call
    x, weights = call.tensor(X, "x"), call.tensor(WEIGHTS, "topk_weights")
    require_float(("x", x), ("topk_weights", weights), ("output", call.outputs[0]))
    for index, name in ((GATE_UP, "gate_up"), (DOWN, "down")):
        spec = call.tensor(index, name)
        require_matrix_dtype(name, spec, experts.target)
        if spec.dtype != x.dtype:
            raise Refused(f"{name} is {spec.dtype} where x is {x.dtype}: they must be equal")
        require_unit_stride(spec, name)
    if call.tensor(IDS, "topk_ids").dtype not in ("int64", "int32"):
        raise Refused(f"topk_ids must be int64 or int32, got {call.tensor(IDS, 'topk_ids').dtype}")
    for index, name in ((IDS, "topk_ids"), (WEIGHTS, "topk_weights")):
        spec = call.tensor(index, name)
        layout = row_layout(spec)
        if (layout.inner, layout.outer_stride) not in ((1, spec.int_dim(-1)), (1, 0)) or spec.stride(-1) != 1:
            raise Refused(f"{name} must be contiguous, got strides {spec.strides}")
    if isinstance(experts.rows, int):
        raise Refused(f"the number of rows must vary with the step, got {experts.rows}")
    if call.attr("act") == CLAMPED_SWIGLU and not experts.has_gate:
        raise Refused(f"{CLAMPED_SWIGLU} needs experts with a gate")


def _align(experts: _Experts) -> TritonKernel:
    """One program an expert: counts all pairs, and writes the places of its own, in the order of pairs."""
    text = experts.text("align")
    text.pointer("topk_ids", IDS)
    pairs = experts.bucket_rows * experts.top_k
    text.constants(BINS=next_power_of_2(experts.num_experts + 1), CHUNK=min(1024, max(32, next_power_of_2(pairs))))
    body = _ALIGN.format(places=experts.places(text, "order"))
    text.scalar(*scalars_in(experts.rows))
    return text.build(body, (experts.num_experts, 1, 1), 4, 1, experts.scratch)


def _gate_up(experts: _Experts) -> TritonKernel:
    """``act(x @ gate) * (x @ up)`` of each pair into ``hidden``; gate and up are columns of one product."""
    call, copies = experts.call, 2 if experts.has_gate else 1
    tile = experts.tile(experts.inner, experts.hidden, copies)
    text = experts.text("gate_up")
    text.pointer("x", X)
    if experts.weights_on_input:
        text.pointer("topk_weights", WEIGHTS)
    text.pointer("w", GATE_UP)
    has_bias = text.pointer("bias", GATE_UP_BIAS)
    text.constants(I=experts.inner, LIMIT=float(call.attr("limit")), ALPHA=float(call.attr("alpha")))
    inner = clamped("offs_n", "I", experts.inner % tile.n == 0)
    split = ""
    if not experts.has_gate:
        columns = f"col = {inner}"
        split = "gate = acc"
    elif call.attr("interleaved"):
        # Column 2i is the gate of i, 2i + 1 its up.
        columns = "col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)"
        if experts.inner % tile.n:
            columns += "\ncol = tl.where(col < 2 * I, col, 0)"
        split = "gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))"
    else:
        # The first half of the tile's columns are gates, the second their ups, I columns later.
        columns = "both = tl.arange(0, COLUMNS)\ncol = tl.program_id(1) * BLOCK_N + both % BLOCK_N\n"
        if experts.inner % tile.n:
            columns += "col = tl.where(col < I, col, 0)\n"
        columns += "col += both // BLOCK_N * I"
        split = "gate, up = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))"
    places = experts.places(text, "hidden", "order")
    body = _product_text(
        experts, text, tile, call.tensor(GATE_UP, "gate_up"), copies, places, columns,
        x_start=text.row_start("X", call.tensor(X, "x"), "(pair // TOP_K)"), k=experts.hidden, has_bias=has_bias,
    )  # fmt: skip
    body += f"{split}\n{_gate_lines(experts)}\n"
    body += (
        "in_bounds = is_pair[:, None] & (offs_n < I)[None, :]\n"
        "tl.store(hidden + (pair * I)[:, None] + offs_n[None, :], value, mask=in_bounds)"
    )
    text.scalar(*scalars_in(experts.rows))
    grid = (experts.num_tiles, -(-experts.inner // tile.n), 1)
    return text.build(body, grid, tile.num_warps, tile.num_stages, experts.scratch)


def _gate_lines(experts: _Experts) -> str:
    """Statements from ``gate`` and ``up`` (fp32) to ``value``."""
    act, lines = experts.call.attr("act"), []
    if experts.has_gate and experts.call.attr("limit") > 0:
        lines += ["gate = tl.minimum(gate, LIMIT)", "up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)"]
    if act == CLAMPED_SWIGLU:
        lines.append("value = (up + 1) * gate * tl.sigmoid(gate * ALPHA)")
    else:
        lines.append(f"value = {activation(act, 'gate')}")
        if experts.has_gate:
            lines.append("value *= up")
    return "\n".join(lines)


def _down(experts: _Experts) -> TritonKernel:
    """``hidden @ down`` of each pair, weighted, into ``terms``."""
    call = experts.call
    tile = experts.tile(experts.hidden, experts.inner, 1)
    text = experts.text("down")
    if not experts.weights_on_input:
        text.pointer("topk_weights", WEIGHTS)
    text.pointer("w", DOWN)
    has_bias = text.pointer("bias", DOWN_BIAS)
    text.constants(H=experts.hidden, I=experts.inner)
    columns = f"col = {clamped('offs_n', 'H', experts.hidden % tile.n == 0)}"
    places = experts.places(text, "hidden", "terms", "order")
    body = _product_text(
        experts, text, tile, call.tensor(DOWN, "down"), 1, places, columns,
        x_start="pair * I", k=experts.inner, has_bias=has_bias, x_name="hidden",
    )  # fmt: skip
    if not experts.weights_on_input:
        body += f"acc = acc.to({TL_DTYPES[experts.dtype]}).to(tl.float32)\n"
        body += "acc *= tl.load(topk_weights + pair).to(tl.float32)[:, None]\n"
    body += (
        "in_bounds = is_pair[:, None] & (offs_n < H)[None, :]\n"
        "tl.store(terms + (pair * H)[:, None] + offs_n[None, :], acc, mask=in_bounds)"
    )
    text.scalar(*scalars_in(experts.rows))
    grid = (experts.num_tiles, -(-experts.hidden // tile.n), 1)
    return text.build(body, grid, tile.num_warps, tile.num_stages, experts.scratch)


def _product_text(
    experts: _Experts, text: KernelText, tile: Tile, weight: ArgSpec, copies: int, places: str, columns: str,
    x_start: str, k: int, has_bias: bool, x_name: str = "x",
) -> str:  # fmt: skip
    """The statements up to ``acc [BLOCK_M, COLUMNS]``, bias added."""
    n_axis, k_axis = (2, 1) if experts.is_transposed else (1, 2)
    block_n = tile.n
    text.constants(
        K=k, BLOCK_N=block_n, COLUMNS=copies * block_n, BLOCK_K=tile.k, W_EXPERT=weight.int_stride(0),
        W_N=weight.int_stride(n_axis), W_K=weight.int_stride(k_axis),
    )  # fmt: skip
    is_even, dtype = k % tile.k == 0, experts.dtype
    before = scale = bias = ""
    if x_name == "x" and experts.weights_on_input:
        before = "row_weight = tl.load(topk_weights + pair).to(tl.float32)"
        scale = f"    a = (a.to(tl.float32) * row_weight[:, None]).to({TL_DTYPES[dtype]})\n"
    if has_bias:
        text.constants(BIAS_EXPERT=weight.int_dim(n_axis))
        bias = "acc += tl.load(bias + expert * BIAS_EXPERT + col).to(tl.float32)[None, :]"
    body = _PRODUCT.format(
        places=places,
        columns=columns,
        x_start=x_start,
        before=before,
        scale=scale,
        mask_a=k_mask(weight, "[None, :]", is_even),
        mask_b=k_mask(weight, "[:, None]", is_even),
        options=dot_options(dtype),
        bias=bias,
    )
    return body if x_name == "x" else body.replace("x_at = x +", f"x_at = {x_name} +")


def _sum(experts: _Experts) -> TritonKernel:
    """The terms of each row, added in the order of the router's choices."""
    text = experts.text("sum")
    text.pointer("topk_ids", IDS)
    text.output("out", 0)
    block_n = min(1024, next_power_of_2(experts.hidden))
    text.constants(H=experts.hidden, BLOCK_N=block_n)
    places = experts.places(text, "terms")
    out_start = text.row_start("OUT", experts.call.outputs[0])
    text.scalar(*scalars_in(experts.rows))
    grid = (experts.rows, -(-experts.hidden // block_n), 1)
    num_warps = 2 if experts.target.startswith("hip") else 4  # of 64 lanes and 32: 8 elements a thread
    return text.build(_SUM.format(places=places, out_start=out_start), grid, num_warps, 1, experts.scratch)
