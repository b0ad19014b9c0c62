"""``sample_tokens`` and ``greedy_tokens``: the best token of each block of a row, then the best of the blocks."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call
from graphserve.kernels.sampling_rules import GROUP, INVALID_TOKEN
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, next_power_of_2, require_float
from graphserve.kernels.triton.sampler_text import DISTANCE, GUMBEL_NOISE, Vocabulary, hash_function, require_shape

_GREEDY_WARPS = 8
_DRAW_WARPS = 4
_GROUPS_AT_ONCE = 8  # whose noise a program computes in one step

# A block's groups that keep something are taken several at once: which one has which place among them is summed from
# their running number, as registers cannot be indexed. Noise costs more than all else, so no other group has any.
_DRAW = """
row = tl.program_id(0).to(tl.int64)
block = tl.program_id(1)
top = tl.load(row_max_ptr + row)
cut = tl.load(cut_ptr + row)
group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
peak = tl.load(group_max_ptr + row * GROUPS + group, mask=group < GROUPS, other=-float("inf"))
is_kept = ((group < GROUPS) & (distance_below(top, peak) <= cut)).to(tl.int32)
number = tl.where(is_kept > 0, tl.cumsum(is_kept, axis=0), 0)
count = tl.sum(is_kept, axis=0)
is_random = (tl.load(temperature_ptr + row) > 0).to(tl.float32)
first_key = tl.load(keys_ptr + row * 2)
second_key = tl.load(keys_ptr + row * 2 + 1)
best = tl.full((), -float("inf"), tl.float32)
token = block * BLOCK
for at in range(0, count, GROUPS_AT_ONCE):
    wanted = at + 1 + tl.arange(0, GROUPS_AT_ONCE)
    taken = tl.sum(tl.where(number[None, :] == wanted[:, None], group[None, :], 0), axis=1)
    column = taken[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (wanted <= count)[:, None] & (column < V)
    score = tl.load(scores_ptr + row * ROW_STRIDE + column, mask=inside, other=-float("inf"))
    distance = distance_below(top, score)
    value = gumbel_noise(column, first_key, second_key) * is_random - distance
    value = tl.where(inside & (distance <= cut), value, -float("inf"))
    largest = tl.max(tl.max(value, axis=1), axis=0)
    first = tl.min(tl.min(tl.where(value == largest, column, V), axis=1), axis=0)
    token = tl.where(largest > best, first, token)
    best = tl.maximum(best, largest)
tl.store(best_ptr + row * NUM_BLOCKS * 2 + block, best)
tl.store(token_ptr + (row * 2 + 1) * NUM_BLOCKS + block, token)
"""
_GREEDY = """
row = tl.program_id(0).to(tl.int64)
block = tl.program_id(1)
column = block * BLOCK + tl.arange(0, BLOCK)
value = tl.load(logits_ptr + row * ROW_STRIDE + column, mask=column < V, other=-float("inf")).to(tl.float32)
best, place = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
has_nan = tl.max((value != value).to(tl.int32), axis=0) > 0
best = tl.where(has_nan, float("nan"), best)
tl.store(best_ptr + row * NUM_BLOCKS * 2 + block, best)
tl.store(token_ptr + (row * 2 + 1) * NUM_BLOCKS + block, block * BLOCK + place)
"""
_REDUCE = """
row = tl.program_id(0).to(tl.int64)
block = tl.arange(0, BLOCKS)
inside = block < NUM_BLOCKS
best = tl.load(best_ptr + row * NUM_BLOCKS * 2 + block, mask=inside, other=-float("inf"))
token = tl.load(token_ptr + (row * 2 + 1) * NUM_BLOCKS + block, mask=inside, other=0)
largest = tl.max(best, axis=0)
first = tl.min(tl.where(best == largest, token, V), axis=0)
"""
_DRAW_TAIL = """
is_possible = tl.load(row_max_ptr + row) > -float("inf")
tl.store(tokens_ptr + row, tl.where(is_possible, first, INVALID).to(tl.int64))
"""
_GREEDY_TAIL = """
has_nan = tl.max((best != best).to(tl.int32), axis=0) > 0
is_possible = (largest > -float("inf")) & (has_nan == 0)
tl.store(tokens_ptr + row, tl.where(is_possible, first, INVALID).to(tl.int64))
"""


def sample_tokens(call: Call, target: str) -> list[TritonKernel]:
    """Gumbel-max over what is kept; see :func:`graphserve.kernels.sampling.sample_tokens`."""
    scores = call.tensor(0, "scores")
    text = KernelText(call, "sample_tokens_block")
    vocabulary = Vocabulary(text, scores, "scores")
    rows = vocabulary.num_rows
    require_shape(scores, "scores", "float32", (rows, vocabulary.size))
    require_shape(call.tensor(1, "group_max"), "group_max", "float32", (rows, vocabulary.num_groups))
    for index, name in enumerate(("row_max", "cut", "temperature"), start=2):
        require_shape(call.tensor(index, name), name, "float32", (rows,))
    require_shape(call.tensor(5, "keys"), "keys", "int32", (rows, 2))
    for index, name in enumerate(("scores", "group_max", "row_max", "cut", "temperature", "keys")):
        text.pointer(f"{name}_ptr", index)
    for helper in (hash_function(), GUMBEL_NOISE, DISTANCE):
        text.helper(helper)
    reduce = KernelText(call, "sample_tokens_reduce")
    reduce.pointer("row_max_ptr", 2)
    text.constants(GROUP=GROUP, GROUPS=vocabulary.num_groups)
    text.constants(GROUPS_AT_ONCE=min(_GROUPS_AT_ONCE, vocabulary.block // GROUP))
    return _two_stages(call, vocabulary, (text, _DRAW, _DRAW_WARPS), reduce, _DRAW_TAIL)


def greedy_tokens(call: Call, target: str) -> list[TritonKernel]:
    """Argmax; see :func:`graphserve.kernels.sampling.greedy_tokens`."""
    logits = call.tensor(0, "logits")
    require_float(("logits", logits))
    text = KernelText(call, "greedy_tokens_block")
    vocabulary = Vocabulary(text, logits, "logits")
    text.pointer("logits_ptr", 0)
    reduce = KernelText(call, "greedy_tokens_reduce")
    return _two_stages(call, vocabulary, (text, _GREEDY, _GREEDY_WARPS), reduce, _GREEDY_TAIL)


def _two_stages(
    call: Call, vocabulary: Vocabulary, first: tuple[KernelText, str, int], reduce: KernelText, tail: str
) -> list[TritonKernel]:
    """Best value and token of each block in scratch memory ``[R, 2, NUM_BLOCKS]``, then the best of each row."""
    block, body, num_warps = first
    rows = vocabulary.num_rows
    scratch = f"8*{vocabulary.num_blocks}*({rows})"
    for text in (block, reduce):
        if text is reduce:
            require_shape(call.outputs[0], "tokens", "int64", (rows,))
            text.output("tokens_ptr", 0)
        text.scratch("best_ptr", "float32")
        text.scratch("token_ptr", "int32")
    blocks = max(16, next_power_of_2(vocabulary.num_blocks))
    reduce.constants(V=vocabulary.size, NUM_BLOCKS=vocabulary.num_blocks, BLOCKS=blocks, INVALID=INVALID_TOKEN)
    grid = (rows, vocabulary.num_blocks, 1)
    return [
        block.build(body, grid, num_warps, scratch=scratch),
        reduce.build(_REDUCE + tail, (rows, 1, 1), 1, scratch=scratch),
    ]
