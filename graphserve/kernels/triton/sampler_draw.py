"""``sample_tokens`` and ``greedy_tokens``: the best token of each block of a row, then the best of the blocks."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call
from graphserve.kernels.sampling_rules import INVALID_TOKEN
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, next_power_of_2, require_float
from graphserve.kernels.triton.sampler_text import DISTANCE, GUMBEL_NOISE, Vocabulary, hash_function, require_shape

_NUM_WARPS = 8

_BLOCK_HEAD = """
row = tl.program_id(0).to(tl.int64)
block = tl.program_id(1)
column = block * BLOCK + tl.arange(0, BLOCK)
inside = column < V
"""
_DRAW = """
score = tl.load(scores_ptr + row * ROW_STRIDE + column, mask=inside, other=-float("inf"))
distance = distance_below(tl.load(row_max_ptr + row), score)
is_random = (tl.load(temperature_ptr + row) > 0).to(tl.float32)
noise = gumbel_noise(column, tl.load(keys_ptr + row * 2), tl.load(keys_ptr + row * 2 + 1))
value = noise * is_random - distance
value = tl.where(inside & (distance <= tl.load(cut_ptr + row)), value, -float("inf"))
best, place = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
"""
_GREEDY = """
value = tl.load(logits_ptr + row * ROW_STRIDE + column, mask=inside, other=-float("inf")).to(tl.float32)
best, place = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
has_nan = tl.max((value != value).to(tl.int32), axis=0) > 0
best = tl.where(has_nan, float("nan"), best)
"""
_BLOCK_TAIL = """
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
    for index, name in enumerate(("row_max", "cut", "temperature"), start=1):
        require_shape(call.tensor(index, name), name, "float32", (rows,))
    require_shape(call.tensor(4, "keys"), "keys", "int32", (rows, 2))
    for index, name in enumerate(("scores", "row_max", "cut", "temperature", "keys")):
        text.pointer(f"{name}_ptr", index)
    for helper in (hash_function(), GUMBEL_NOISE, DISTANCE):
        text.helper(helper)
    reduce = KernelText(call, "sample_tokens_reduce")
    reduce.pointer("row_max_ptr", 1)
    return _two_stages(call, vocabulary, text, _DRAW, reduce, _DRAW_TAIL)


def greedy_tokens(call: Call, target: str) -> list[TritonKernel]:
    """Argmax; see :func:`graphserve.kernels.sampling.greedy_tokens`."""
    logits = call.tensor(0, "logits")
    require_float(("logits", logits))
    text = KernelText(call, "greedy_tokens_block")
    vocabulary = Vocabulary(text, logits, "logits")
    text.pointer("logits_ptr", 0)
    reduce = KernelText(call, "greedy_tokens_reduce")
    return _two_stages(call, vocabulary, text, _GREEDY, reduce, _GREEDY_TAIL)


def _two_stages(
    call: Call, vocabulary: Vocabulary, block: KernelText, body: str, reduce: KernelText, tail: str
) -> list[TritonKernel]:
    """Best value and token of each block in scratch memory ``[R, 2, NUM_BLOCKS]``, then the best of each row."""
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
        block.build("".join([_BLOCK_HEAD, body, _BLOCK_TAIL]), grid, _NUM_WARPS, scratch=scratch),
        reduce.build(_REDUCE + tail, (rows, 1, 1), 1, scratch=scratch),
    ]
