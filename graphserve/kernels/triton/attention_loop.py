"""Text of the attention kernel's loop: one tile of keys and values scored, weighed and summed."""

from __future__ import annotations

import textwrap

from graphserve.kernels.triton.attention_form import AttentionForm, AttentionTile, Part
from graphserve.kernels.triton.kernel import TL_DTYPES

E4M3_HELPER = '''
@triton.jit
def e4m3_to_fp16(bits):
    """The value of each e4m3 byte (0x7f and 0xff, its NaNs, come out as 480): the exponent bias of fp16 is 8 more."""
    bits = bits.to(tl.uint8, bitcast=True)
    sign = (bits & 0x80).to(tl.uint16) << 8
    rest = (bits & 0x7F).to(tl.uint16) << 7
    return (sign | rest).to(tl.float16, bitcast=True) * 256.0
'''


def lacks_e4m3(target: str) -> bool:
    """The processor has no instructions for float8_e4m3fn (gfx942 has another e4m3)."""
    return target in ("cuda:80", "hip:gfx942")


def bits_are_converted(form: AttentionForm, target: str) -> bool:
    """The kernel gets the cache as bytes and widens them in integers."""
    return form.cache_dtype == "float8_e4m3fn" and lacks_e4m3(target)


def loops(form: AttentionForm, tile: AttentionTile, target: str) -> list[str]:
    """The loop over the tiles that need a mask, and before it the one over those that need none."""
    if not form.has_full_tiles:
        text = [_loop(form, tile, target, "first_tile", True)]
    else:
        text = [_loop(form, tile, target, "first_tile", False), _loop(form, tile, target, "full_tile", True)]
    return [_before_loops(form), *text] if form.loads_ids_ahead(tile.tile) else text


def _before_loops(form: AttentionForm) -> str:
    """What is the same for every tile: a tile starts with a block, so that its keys lie alike in their blocks."""
    lines = [
        "# A tile is whole blocks, whose numbers are loaded a tile ahead: copies of keys and values wait for nothing.",
        "tile_key = tl.arange(0, TILE)",
        "slot = (tile_key % BLOCK_SIZE)[:, None]",
        "tile_table_ptr = block_table_ptr + table_row + tile_key // BLOCK_SIZE",
    ]
    for x, parts in _cached(form):
        name = x.upper()
        for i in range(len(parts)):
            place = f"kv_head * {name}_HEAD_STRIDE + slot * {name}_TOKEN_STRIDE + {columns_of(x, i)}[None, :]"
            lines.append(f"{x}_slot_ptr_{i} = {_name(form, x)} + ({place})")
    return "\n".join([*lines, _next_ids("first_tile")])


def _next_ids(tile: str) -> str:
    inside = f"{tile} * TILE + tile_key < seq_len"
    return f"next_id = tl.load(tile_table_ptr + {tile} * (TILE // BLOCK_SIZE), mask={inside}, other=0)"


def _cached(form: AttentionForm) -> list[tuple[str, tuple[Part, ...]]]:
    """What is read of a token, keys and values, with the parts of a head."""
    return [("k", form.k_parts)] + [("v", form.v_parts)] * (not form.value_is_key_prefix)


def _loop(form: AttentionForm, tile: AttentionTile, target: str, first: str, masked: bool) -> str:
    end = "last_tile" if masked else "full_tile"
    addresses = _addresses_ahead(form, masked) if form.loads_ids_ahead(tile.tile) else _addresses(form, masked)
    body = [*addresses, *_scores(form, tile, target, masked), *_accumulate(form, tile, target, masked)]
    # A tile or two need a mask where others need none: to have more of them in flight would only take registers.
    tiles = f"tl.range({first}, {end}, num_stages=2)" if masked and form.has_full_tiles else f"range({first}, {end})"
    return f"for tile in {tiles}:\n" + textwrap.indent("\n".join(body), "    ")


def _key(form: AttentionForm, masked: bool) -> list[str]:
    """Places of the tile's keys in the sequence, and which of them may be read."""
    lines = ["key = tile * TILE + tl.arange(0, TILE)"]
    if masked:
        is_key = "(key >= first_visible) & (key < seq_len)" if form.has_first_key else "key < seq_len"
        lines.append(f"is_key = {is_key}")
    return lines


def _addresses_ahead(form: AttentionForm, masked: bool) -> list[str]:
    """Elements at which the tile's blocks start, whose numbers are there, and the next tile's numbers."""
    blocks = [f"{x}_block = next_id.to(tl.int64)[:, None] * {x.upper()}_BLOCK_STRIDE" for x, _ in _cached(form)]
    return [*(_key(form, masked) if masked or form.has_alibi else []), *blocks, _next_ids("(tile + 1)")]


def _addresses(form: AttentionForm, masked: bool) -> list[str]:
    """Elements at which the tile's keys and values start."""
    lines = _key(form, masked)
    if not form.block_size:
        lines += ["key_token = (first_token + key).to(tl.int64)"]
        return lines + [
            f"{x}_row = key_token * {x.upper()}_TOKEN_STRIDE + kv_head * {x.upper()}_HEAD_STRIDE" for x in "kv"
        ]
    mask = ", mask=is_key, other=0" if masked else ""
    lines += [
        f"block_id = tl.load(block_table_ptr + table_row + key // BLOCK_SIZE{mask}).to(tl.int64)",
        "slot = key % BLOCK_SIZE",
    ]
    for x, _ in _cached(form):
        name = x.upper()
        lines.append(
            f"{x}_row = block_id * {name}_BLOCK_STRIDE + kv_head * {name}_HEAD_STRIDE + slot * {name}_TOKEN_STRIDE"
        )
    return lines


def _scores(form: AttentionForm, tile: AttentionTile, target: str, masked: bool) -> list[str]:
    """Scores of the tile in log-2 units, or, without soft cap and ALiBi, still to be multiplied by score_scale."""
    lines = [f"k_{i} = {_load(form, tile, target, 'k', i, part, masked)}" for i, part in enumerate(form.k_parts)]
    for i in range(len(form.k_parts)):
        total = f", scores{_precision(form)}" if i else _precision(form)
        lines.append(f"scores = tl.dot(q_{i}, tl.trans(k_{i}){total})")
    if form.softcap:
        lines += [
            "# tanh(x) = 1 - 2 / (exp(2x) + 1)",
            "capped = tl.exp2(scores * (score_scale * (2 * LOG2E / SOFTCAP)))",
            "scores = (SOFTCAP * LOG2E) * (1 - 2 / (capped + 1))",
        ]
    elif form.has_alibi:
        lines.append("scores = scores * score_scale")
    if form.has_alibi:
        lines.append("scores += slope[:, None] * (key[None, :] - position[:, None])")
    if masked:
        lines.append(f'scores = tl.where({_visible(form)}, scores, float("-inf"))')
    return lines


def _accumulate(form: AttentionForm, tile: AttentionTile, target: str, masked: bool) -> list[str]:
    factor = "" if form.softcap or form.has_alibi else " * score_scale"
    lines = [f"new_max = tl.maximum(row_max, tl.max(scores, 1){factor})"]
    shift = "new_max"
    if masked:
        lines.append("# A row that has seen no key yet stays at -inf; exp2(-inf - 0) is 0 where -inf - -inf is NaN.")
        lines.append('shift = tl.where(new_max == float("-inf"), 0.0, new_max)')
        shift = "shift"
    lines += [
        f"weights = tl.exp2(scores{factor} - {shift}[:, None])",
        f"correction = tl.exp2(row_max - {shift})",
        "row_sum = row_sum * correction + tl.sum(weights, 1)",
        "row_max = new_max",
        f"weights = weights.to({TL_DTYPES[form.dtype]})",
    ]
    for i, part in enumerate(form.v_parts):
        value = f"k_{i}"
        if not form.value_is_key_prefix:
            value = f"v_{i}"
            lines.append(f"v_{i} = {_load(form, tile, target, 'v', i, part, masked)}")
        lines.append(f"acc_{i} = tl.dot(weights, {value}, acc_{i} * correction[:, None]{_precision(form)})")
    return lines


def _load(form: AttentionForm, tile: AttentionTile, target: str, x: str, index: int, part: Part, masked: bool) -> str:
    """A tile ``[TILE, width]`` of keys or values in the queries' dtype."""
    columns = columns_of(x, index)
    mask = element_mask("is_key[:, None]" if masked else "", part, columns, f"{x.upper()}_DIM")
    pointer = f"{_name(form, x)} + {x}_row[:, None] + {columns}[None, :]"
    if form.loads_ids_ahead(tile.tile):
        pointer = f"{x}_slot_ptr_{index} + {x}_block"
    zero = "0" if bits_are_converted(form, target) else "0.0"
    loaded = f"tl.load({pointer}, mask={mask}, other={zero})" if mask else f"tl.load({pointer})"
    if form.cache_dtype == form.dtype:
        return loaded
    if bits_are_converted(form, target):
        loaded = f"e4m3_to_fp16({loaded})"
    return f"{loaded}.to({TL_DTYPES[form.dtype]})"


def _name(form: AttentionForm, x: str) -> str:
    return f"kv_{x}_ptr" if form.block_size else f"{x}_ptr"


def _visible(form: AttentionForm) -> str:
    last = ["(key[None, :] <= last_key[:, None])" if form.has_last_key else "is_key[None, :]"]
    first = ["(key[None, :] >= first_key[:, None])"] * form.has_first_key
    return " & ".join(last + first)


def _precision(form: AttentionForm) -> str:
    """fp32 models get fp32 products; the default would round their operands to tf32."""
    return ', input_precision="ieee"' if form.dtype == "float32" else ""


def columns_of(x: str, index: int) -> str:
    """Name of the columns of part ``index`` of keys (and queries) or values."""
    return f"{x}_columns_{index}"


def element_mask(rows: str, part: Part, columns: str, dim: str) -> str:
    """Mask of a tile's elements: the rows' condition and, for a padded part, the head's end; empty for neither."""
    inside = f"({columns} < {dim})[None, :]" if part.is_padded else ""
    return " & ".join(term for term in (rows, inside) if term)
