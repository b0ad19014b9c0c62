"""Text of the attention kernel: queries of one sequence against its keys, one tile after another.

Method: the online softmax of Dao et al. 2022 (FlashAttention, algorithm 1) in base 2, over keys that a block table
scatters (Kwon et al. 2023), with the query heads of one key head packed into the rows of a tile.
"""

from __future__ import annotations

import textwrap

from graphserve.kernels.triton.attention_form import AttentionForm, AttentionTile, Part
from graphserve.kernels.triton.attention_loop import columns_of, element_mask, loops
from graphserve.kernels.triton.kernel import TL_DTYPES

LOG2E = 1.4426950408889634


def attention_body(form: AttentionForm, tile: AttentionTile, target: str, table_length: str) -> str:
    """Statements of the kernel's function, in order.

    Args:
        form: sizes and rule.
        tile: how a program is cut.
        target: what it is compiled for.
        table_length: the step scalar that is the length of a block table's row; empty without a cache.
    """
    sections = [
        _locate_queries(form),
        _rows(form, tile, table_length),
        _load_queries(form),
        _key_range(form),
        _accumulators(form),
        *loops(form, tile, target),
        _store_partial(form) if form.is_split else _store(form),
    ]
    return "\n\n".join(section.strip("\n") for section in sections if section.strip())


def _text(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def _locate_queries(form: AttentionForm) -> str:
    """Which sequence, which of its query tokens, how many keys."""
    length = (
        "tl.load(seq_lens_ptr + sequence, mask={live}, other=0)"
        if form.block_size
        else "tl.where({live}, query_len, 0)"
    )
    if form.single_query:
        return _text(f"""
            # Token t is the one query of sequence t. Padding tokens have no keys, so that they get zeros.
            sequence = tl.program_id(0)
            first_token = sequence
            block_start = 0
            query_len = 1
            is_live = tl.load(query_start_loc_ptr + sequence + 1, mask=sequence < S, other=0) > sequence
            seq_len = {length.format(live="is_live")}
        """)
    return _text(f"""
        # Sequence s owns the query blocks from query_start_loc[s] // BLOCK_Q + s on. The padding tokens behind the
        # last sequence are sequence S; it has no keys, so that they get zeros. The last blocks of a sequence have the
        # most keys and start first.
        block = tl.num_programs(0) - 1 - tl.program_id(0)
        sequence = 0
        high = S
        while sequence < high:
            middle = (sequence + high + 1) // 2
            if tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle <= block:
                sequence = middle
            else:
                high = middle - 1
        is_live = sequence < S
        first_token = tl.load(query_start_loc_ptr + sequence)
        query_len = tl.load(query_start_loc_ptr + sequence + 1, mask=is_live, other=T) - first_token
        block_start = (block - first_token // BLOCK_Q - sequence) * BLOCK_Q
        if block_start >= query_len:
            return
        seq_len = {length.format(live="is_live")}
    """)


def _rows(form: AttentionForm, tile: AttentionTile, table_length: str) -> str:
    """Rows of the tile: token-major, the heads of a group beside each other."""
    lines = ["# Row r is query token r // GROUP_ROWS of the block and head r % GROUP_ROWS of the group."]
    if form.group > tile.block_m:
        lines += [
            "kv_head = tl.program_id(1) // GROUP_BLOCKS",
            "row = tl.arange(0, BLOCK_M)",
            "group_head = tl.program_id(1) % GROUP_BLOCKS * GROUP_ROWS + row % GROUP_ROWS",
        ]
    else:
        lines += ["kv_head = tl.program_id(1)", "row = tl.arange(0, BLOCK_M)", "group_head = row % GROUP_ROWS"]
    lines += [
        "query = row // GROUP_ROWS",
        "row_token = block_start + query",
        "is_row = (row < BLOCK_Q * GROUP_ROWS) & (group_head < GROUP) & (row_token < query_len)",
        "head = kv_head * GROUP + group_head",
        "first_row = (first_token + block_start).to(tl.int64)",
        "position = seq_len - query_len + row_token",
    ]
    if form.block_size:
        lines.append(f"table_row = {table_length}.to(tl.int64) * sequence")
    return "\n".join(lines)


def _load_queries(form: AttentionForm) -> str:
    lines = [f"{columns_of('k', i)} = {_arange(part)}" for i, part in enumerate(form.k_parts)]
    if not form.value_is_key_prefix:
        lines += [f"{columns_of('v', i)} = {_arange(part)}" for i, part in enumerate(form.v_parts)]
    lines.append("# One 64-bit address for the block and 32-bit offsets for its rows: fewer registers.")
    lines.append("q_tile_ptr = q_ptr + first_row * Q_TOKEN_STRIDE")
    lines.append("q_row = query * Q_TOKEN_STRIDE + head * Q_HEAD_STRIDE")
    for i, part in enumerate(form.k_parts):
        mask = element_mask("is_row[:, None]", part, columns_of("k", i), "K_DIM")
        address = f"q_tile_ptr + q_row[:, None] + {columns_of('k', i)}[None, :]"
        lines.append(f"q_{i} = tl.load({address}, mask={mask}, other=0.0)")
    return "\n".join(lines)


def _key_range(form: AttentionForm) -> str:
    """First and last visible key of each row, and the tiles that hold a key of any row."""
    lines = ["# A row sees the keys first_key .. last_key; a tile is read if any row of the block sees a key of it."]
    lines += [
        "block_position = seq_len - query_len + block_start",
        "last_position = tl.minimum(block_position + BLOCK_Q, seq_len) - 1",
    ]
    if form.has_last_key:
        lines += [
            f"last_key = {_last_key(form, 'position')}",
            f"last_tile = ({_last_key(form, 'last_position')} + TILE) // TILE",
        ]
    else:
        lines.append("last_tile = (seq_len + TILE - 1) // TILE")
    if form.has_first_key:
        lines += [
            f"first_key = {_first_key(form, 'position')}",
            "# Blocks of earlier keys may have been given away; what they hold now must not be read (0 * NaN is NaN).",
            f"first_visible = tl.maximum({_first_key(form, 'block_position')}, 0)",
            "first_tile = first_visible // TILE",
        ]
    else:
        lines.append("first_tile = 0")
    if form.is_split:
        lines += [
            "segment = tl.program_id(2)",
            "segment_tiles = (last_tile - first_tile + SEGMENTS - 1) // SEGMENTS",
            "first_tile += segment * segment_tiles",
            "last_tile = tl.minimum(last_tile, first_tile + segment_tiles)",
        ]
    if form.has_full_tiles:
        whole = "(block_position + 1) // TILE" if form.causal else "seq_len // TILE"
        lines.append("# Every row sees all keys of the tiles before full_tile: no mask.")
        lines.append(f"full_tile = tl.maximum(tl.minimum({whole}, last_tile), first_tile)")
    return "\n".join(lines)


def _first_key(form: AttentionForm, position: str) -> str:
    bounds = [f"{position} - WINDOW + 1"] * bool(form.window) + [f"{position} // CHUNK * CHUNK"] * bool(form.chunk)
    return _fold("tl.maximum", bounds)


def _last_key(form: AttentionForm, position: str) -> str:
    if form.causal:
        return f"tl.minimum({position}, seq_len - 1)"
    window = [f"{position} + WINDOW - 1"] * bool(form.window)
    chunk = [f"{position} // CHUNK * CHUNK + CHUNK - 1"] * bool(form.chunk)
    return _fold("tl.minimum", ["seq_len - 1", *window, *chunk])


def _fold(function: str, terms: list[str]) -> str:
    folded = terms[0]
    for term in terms[1:]:
        folded = f"{function}({folded}, {term})"
    return folded


def _accumulators(form: AttentionForm) -> str:
    lines = ["# Scores are kept in units of log 2: exp(x) = exp2(x * LOG2E)."]
    scale = "SCALE" if form.softcap else "SCALE * LOG2E"
    lines.append(f"score_scale = {scale} * tl.load(k_scale_ptr)" if form.is_scaled else f"score_scale = {scale}")
    if form.has_alibi:
        lines.append("slope = tl.load(alibi_ptr + head, mask=is_row, other=0.0) * LOG2E")
    if form.has_sinks:
        lines.append("# A sink is a key with value zero: it seeds the maximum and the sum, not the accumulator.")
        sink = "tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * LOG2E"
        if form.is_split:
            lines += [
                f'row_max = tl.where(segment == 0, {sink}, float("-inf"))',
                "row_sum = tl.where((segment == 0) & (row >= 0), 1.0, 0.0)",
            ]
        else:
            lines += [f"row_max = {sink}", "row_sum = tl.full([BLOCK_M], 1.0, tl.float32)"]
    else:
        lines += [
            'row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)',
            "row_sum = tl.zeros([BLOCK_M], tl.float32)",
        ]
    lines += [f"acc_{i} = tl.zeros([BLOCK_M, {p.width}], tl.float32)" for i, p in enumerate(form.v_parts)]
    return "\n".join(lines)


def _store(form: AttentionForm) -> str:
    lines = ["# A row without any key has the sum 0 and gets zeros."]
    lines.append("inverse = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)")
    factors = ["tl.load(v_scale_ptr)"] * form.is_scaled + ["(1.0 / tl.load(out_scale_ptr))"] * is_quantized(
        form.out_dtype
    )
    if factors:
        lines.append(f"inverse *= {' * '.join(factors)}")
    lines.append("out_tile_ptr = out_ptr + first_row * OUT_TOKEN_STRIDE")
    lines.append("out_row = query * OUT_TOKEN_STRIDE + head * V_DIM")
    for i, part in enumerate(form.v_parts):
        columns = _value_columns(form, i)
        mask = element_mask("is_row[:, None]", part, columns, "V_DIM")
        lines.append(f"acc_{i} *= inverse[:, None]")
        value = rounded(f"acc_{i}", form.out_dtype)
        lines.append(f"tl.store(out_tile_ptr + out_row[:, None] + {columns}[None, :], {value}, mask={mask})")
    return "\n".join(lines)


def _store_partial(form: AttentionForm) -> str:
    """The segment's own result and the base-2 logarithm of its sum of weights, for the reduce kernel."""
    lines = [
        "total = tl.where(row_sum == 0.0, 1.0, row_sum)",
        "inverse = 1.0 / total",
        "# partial: [T, HEADS, SEGMENTS, V_DIM] results, then [T, HEADS, SEGMENTS] logarithms",
        "part_row = ((first_row + query) * HEADS + head) * SEGMENTS + segment",
        'log_sum = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(total))',
        "tl.store(partial_ptr + T.to(tl.int64) * (HEADS * SEGMENTS * V_DIM) + part_row, log_sum, mask=is_row)",
        "is_part = is_row & (row_sum != 0.0)",
    ]
    for i, part in enumerate(form.v_parts):
        columns = _value_columns(form, i)
        mask = element_mask("is_part[:, None]", part, columns, "V_DIM")
        address = f"partial_ptr + part_row[:, None] * V_DIM + {columns}[None, :]"
        lines.append(f"tl.store({address}, acc_{i} * inverse[:, None], mask={mask})")
    return "\n".join(lines)


def rounded(value: str, dtype: str) -> str:
    """The expression of an fp32 value in another dtype, saturated and rounded to the nearest (ties to even)."""
    if dtype == "int8":
        # Adding 1.5 * 2**23 leaves an fp32 number without places behind the point.
        return f"(tl.clamp({value}, -128.0, 127.0) + 12582912.0 - 12582912.0).to(tl.int8)"
    if dtype == "float8_e4m3fn":
        return f"tl.clamp({value}, -448.0, 448.0).to(tl.float8e4nv)"
    return f"{value}.to({TL_DTYPES[dtype]})"


def is_quantized(dtype: str) -> bool:
    """A result dtype that needs a scale."""
    return dtype in ("int8", "float8_e4m3fn")


def _value_columns(form: AttentionForm, index: int) -> str:
    return columns_of("k" if form.value_is_key_prefix else "v", index)


def _arange(part: Part) -> str:
    return f"tl.arange(0, {part.width})" if not part.start else f"{part.start} + tl.arange(0, {part.width})"
