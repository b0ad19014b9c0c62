"""What one attention kernel is specialised by: sizes, rule, cache form, and the tile that its programs work on."""

from __future__ import annotations

from dataclasses import dataclass

from graphserve.kernels.arg_spec import ITEM_SIZES
from graphserve.kernels.triton.kernel import next_power_of_2


@dataclass(frozen=True)
class Part:
    """Columns ``start .. start + size`` of a head, held in registers as ``width`` (a power of two) columns."""

    start: int
    size: int
    width: int

    @property
    def is_padded(self) -> bool:
        """Some of the register columns lie behind the head's last one."""
        return self.width != self.size


@dataclass(frozen=True)
class AttentionForm:
    """One kernel's sizes and rule.

    Attributes:
        dtype: of the queries and of both matrix products' operands.
        cache_dtype: of keys and values in memory.
        out_dtype: of the result.
        kv_heads: key heads.
        group: query heads that share one key head.
        k_dim: head size of queries and keys.
        v_dim: head size of values.
        block_size: tokens of a cache block; 0 for keys that lie packed like the queries.
        value_is_key_prefix: the values are the first ``v_dim`` columns of the keys (a latent cache), read once.
        causal: see :func:`graphserve.kernels.attention.visible_keys`, like ``window`` and ``chunk``.
        softcap: 0 for none.
        has_sinks: one extra logit a head with value zero.
        has_alibi: one slope a head.
        segments: programs that share one query's keys.
        quantizes_rows: the result is quantized with one scale a token, over all heads.
        single_query: no sequence has more than one query token, and those with none come last.
    """

    dtype: str
    cache_dtype: str
    out_dtype: str
    kv_heads: int
    group: int
    k_dim: int
    v_dim: int
    block_size: int
    value_is_key_prefix: bool
    causal: bool
    window: int
    chunk: int
    softcap: float
    has_sinks: bool
    has_alibi: bool
    segments: int
    quantizes_rows: bool
    single_query: bool

    @property
    def is_split(self) -> bool:
        """Whether programs write partial results, for a second kernel that sees all segments and heads of a token."""
        return self.segments > 1 or self.quantizes_rows

    @property
    def least_width(self) -> int:
        """Fewest columns of a matrix product's operand."""
        return 32 if ITEM_SIZES[self.cache_dtype] == 1 else 16

    @property
    def is_scaled(self) -> bool:
        """Keys and values are a scale times what the cache holds."""
        return self.cache_dtype != self.dtype

    @property
    def has_first_key(self) -> bool:
        """Keys before some position are out of sight."""
        return bool(self.window or self.chunk)

    @property
    def has_last_key(self) -> bool:
        """Keys behind some position, though before the sequence's end, are out of sight."""
        return self.causal or self.has_first_key

    @property
    def has_full_tiles(self) -> bool:
        """It pays to loop over the tiles that all rows see from end to end without a mask."""
        return not (self.single_query or self.has_first_key)

    def loads_ids_ahead(self, tile: int) -> bool:
        """The loop carries the block numbers of the next ``tile`` keys; a decode program is too short for it to pay."""
        return bool(self.block_size) and tile % self.block_size == 0 and not self.single_query

    @property
    def k_parts(self) -> tuple[Part, ...]:
        """Columns of queries and keys."""
        return head_parts(self.k_dim, self.least_width)

    @property
    def v_parts(self) -> tuple[Part, ...]:
        """Columns of values and result."""
        return head_parts(self.v_dim, self.least_width)


@dataclass(frozen=True)
class AttentionTile:
    """How a program is cut.

    Attributes:
        block_m: rows of a program: query tokens times the heads that share a key head.
        tile: keys of one loop step.
        num_warps: warps of a program.
        num_stages: loop steps whose keys and values are in flight.
    """

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


def head_parts(dim: int, least_width: int) -> tuple[Part, ...]:
    """Cut a head into at most two powers of two, so that 80 takes 64 + 16 columns and not 128.

    Args:
        dim: head size.
        least_width: fewest columns of a part.
    """
    whole = max(next_power_of_2(dim), least_width)
    main = whole // 2
    tail = max(next_power_of_2(dim - main), least_width)
    if dim <= main or main + tail >= whole:
        return (Part(0, dim, whole),)
    return (Part(0, main, main), Part(main, dim - main, tail))


# Bytes of keys and values in flight. A decode program waits on memory, so several should share a processor (163 KiB on
# sm_80, 227 KiB on sm_90 and sm_100, 64 KiB on gfx942); the others also hold their queries there.
_DECODE_BYTES = {"cuda:80": 80 << 10, "cuda:90": 80 << 10, "cuda:100": 80 << 10, "hip:gfx942": 24 << 10}
_MIXED_BYTES = {"cuda:80": 96 << 10, "cuda:90": 144 << 10, "cuda:100": 144 << 10, "hip:gfx942": 48 << 10}


def choose_tile(form: AttentionForm, target: str) -> AttentionTile:
    """Rows, keys, warps and stages of a program.

    The choice rests on what compiles show: accumulators and scores fit in registers, tiles in shared memory, matrix
    instructions have the rows they want (64 a warp group on sm_90). Heads of 128 on sm_90 are tuned on a device.
    """
    is_hip = target.startswith("hip")
    key_columns = sum(part.width for part in form.k_parts)
    value_columns = sum(part.width for part in form.v_parts)
    loaded_columns = key_columns + (0 if form.value_is_key_prefix else value_columns)
    # A latent head's accumulator takes the registers that more rows or keys would need.
    is_wide = value_columns >= 512
    if form.dtype == "float32" and key_columns >= 32:
        # Exact products are multiply-adds over registers: tiles of the size of a matrix instruction's would spill.
        tile = 16 if key_columns >= 256 or len(form.k_parts) > 1 else 32
        return AttentionTile(16, tile, 8 if target in ("cuda:90", "cuda:100") else 4, 2)
    if form.single_query:
        # More rows than a token has heads would be idle.
        block_m = min(max(16, next_power_of_2(form.group)), 32 if is_wide else 64)
        tile = 128 if len(form.k_parts) == 1 else 64
    else:
        block_m = 128 if value_columns <= 128 else 32 if is_wide else 64
        # Without warp-group instructions the tile's scores and both operands lie in registers too.
        tile = 64
        if target == "cuda:80" and value_columns > 64:
            tile = 16 if value_columns > 128 and len(form.v_parts) > 1 else 32
        # Two products a tile, whose registers the compiler for sm_100 limits to half.
        if target == "cuda:100" and len(form.v_parts) > 1:
            tile = 32
    if is_wide:
        tile = 16 if is_hip else 32
    has_warp_groups = target in ("cuda:90", "cuda:100") and block_m >= 64
    buffers = 1 if is_hip else 2
    limit = (_DECODE_BYTES if form.single_query else _MIXED_BYTES)[target]
    while tile > 16 and buffers * tile * loaded_columns * ITEM_SIZES[form.dtype] > limit:
        tile //= 2
    if form.loads_ids_ahead(tile):
        # The tile in use and those whose copies are under way: one of half a processor's 64 KiB on gfx942, else two.
        num_stages = 2 if is_hip else 3
    else:
        # Keys wait for their block numbers, which are loaded ahead as well: the compiler spreads the stages over both,
        # and keeps one buffer more where matrix instructions run beside the copies.
        num_stages = 3 if is_hip or has_warp_groups else 5
    num_warps = 8 if not is_hip and (block_m >= 128 or block_m * value_columns > 64 * 128) else 4
    is_plain = form.cache_dtype == form.dtype and ITEM_SIZES[form.dtype] == 2
    if target == "cuda:90" and key_columns == value_columns == 128 and is_plain:
        # The heads of most models: measured on an H200 (benchmarks/gpu_tune.py). Rows of 128 keys take every register
        # there is, and some forms would need more.
        is_roomy = form.loads_ids_ahead(128) and not form.has_first_key and next_power_of_2(form.group) == form.group
        tile, num_stages = (128, 3) if is_roomy else (64, 3)
    return AttentionTile(block_m, tile, num_warps, num_stages)
