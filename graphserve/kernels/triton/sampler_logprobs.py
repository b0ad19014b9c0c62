"""``top_logprobs`` without a softmax in memory: log-sum-exp and best tokens of each block, then of each row.

The best tokens are taken one after the other from codes whose order as int32 is that of the floats: a token that is
taken gets a code below that of minus infinity, so it cannot be taken again.
"""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call, Refused
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, next_power_of_2, require_float
from graphserve.kernels.triton.sampler_text import Vocabulary, require_shape

MAX_COUNT = 64  # taken one by one; more are the host's work
_NUM_WARPS = 8

_ORDER = """
@triton.jit
def ordered(bits):
    # Order of floats as int32; applied twice it gives the bits back.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
"""
# Scratch memory of a row: NUM_BLOCKS values each of the block's largest logit, its sum of exponentials, and its number
# of logits above the given token's; then COUNT codes a block, then their tokens.
_PARTS = """
values = values_ptr + row * NUM_BLOCKS * (3 + 2 * COUNT)
counts = counts_ptr + row * NUM_BLOCKS * (3 + 2 * COUNT)
codes = counts + 3 * NUM_BLOCKS
tokens = codes + NUM_BLOCKS * COUNT
"""
_BLOCK = """
row = tl.program_id(0).to(tl.int64)
block = tl.program_id(1)
column = block * BLOCK + tl.arange(0, BLOCK)
inside = column < V
logits = logits_ptr + row * ROW_STRIDE
x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
largest = tl.max(x, axis=0)
shift = tl.where(largest > -float("inf"), largest, 0.0)
given = tl.load(logits + tl.maximum(tl.load(token_ids_ptr + row), 0)).to(tl.float32)
tl.store(values + block, shift)
tl.store(values + NUM_BLOCKS + block, tl.sum(tl.exp(x - shift), axis=0))
tl.store(counts + 2 * NUM_BLOCKS + block, tl.sum((x > given).to(tl.int32), axis=0))
code = tl.where(inside, ordered(x.to(tl.int32, bitcast=True)), TAKEN)
for i in range(COUNT):
    best, place = tl.max(code, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(codes + block * COUNT + i, best)
    tl.store(tokens + block * COUNT + i, block * BLOCK + place)
    code = tl.where(column == block * BLOCK + place, TAKEN, code)
"""
_REDUCE = """
row = tl.program_id(0).to(tl.int64)
block = tl.arange(0, BLOCKS)
inside = block < NUM_BLOCKS
shift = tl.load(values + block, mask=inside, other=-float("inf"))
sums = tl.load(values + NUM_BLOCKS + block, mask=inside, other=0.0)
largest = tl.max(shift, axis=0)
log_total = largest + tl.log(tl.sum(sums * tl.exp(shift - largest), axis=0))
above = tl.load(counts + 2 * NUM_BLOCKS + block, mask=inside, other=0)
tl.store(ranks_ptr + row, tl.sum(above, axis=0).to(tl.int64) + 1)
given = tl.maximum(tl.load(token_ids_ptr + row), 0)
tl.store(ids_ptr + row * (1 + COUNT), given)
given_logit = tl.load(logits_ptr + row * ROW_STRIDE + given).to(tl.float32)
tl.store(logprobs_ptr + row * (1 + COUNT), given_logit - log_total)
"""
# Blocks are in the order of their tokens, and so is what each found at one value: the leftmost has the smallest id.
_MERGE = """
place = tl.arange(0, CANDIDATES)
code = tl.load(codes + place, mask=place < NUM_BLOCKS * COUNT, other=TAKEN)
token = tl.load(tokens + place, mask=place < NUM_BLOCKS * COUNT, other=0)
for i in range(COUNT):
    best, at = tl.max(code, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(ids_ptr + row * (1 + COUNT) + 1 + i, tl.sum(tl.where(place == at, token, 0), axis=0).to(tl.int64))
    tl.store(logprobs_ptr + row * (1 + COUNT) + 1 + i, ordered(best).to(tl.float32, bitcast=True) - log_total)
    code = tl.where(place == at, TAKEN, code)
"""


def top_logprobs(call: Call, target: str) -> list[TritonKernel]:
    """Log-probabilities of a given token and the best ones; see :func:`graphserve.kernels.sampling.top_logprobs`."""
    logits, count = call.tensor(0, "logits"), int(call.attr("count"))
    require_float(("logits", logits))
    block, reduce = KernelText(call, "top_logprobs_block"), KernelText(call, "top_logprobs_reduce")
    for text in (block, reduce):
        vocabulary = Vocabulary(text, logits, "logits")
        text.constants(COUNT=count, TAKEN=-(2**31))
        text.helper(_ORDER)
        text.pointer("logits_ptr", 0)
        text.pointer("token_ids_ptr", 1)
    if not 0 <= count <= min(MAX_COUNT, vocabulary.size):
        raise Refused(
            f"count is {count}: 0 to {min(MAX_COUNT, vocabulary.size)} of {vocabulary.size} tokens are served"
        )
    rows, num_blocks = vocabulary.num_rows, vocabulary.num_blocks
    require_shape(call.tensor(1, "token_ids"), "token_ids", "int64", (rows,))
    results = (
        ("ids", "int64", (rows, 1 + count)),
        ("logprobs", "float32", (rows, 1 + count)),
        ("ranks", "int64", (rows,)),
    )
    for index, (name, dtype, shape) in enumerate(results):
        require_shape(call.outputs[index], name, dtype, shape)
        reduce.output(f"{name}_ptr", index)
    for text in (block, reduce):
        text.scratch("values_ptr", "float32")
        text.scratch("counts_ptr", "int32")
    blocks, candidates = next_power_of_2(num_blocks), next_power_of_2(num_blocks * count)
    reduce.constants(BLOCKS=max(16, blocks), CANDIDATES=max(16, candidates))
    scratch = f"4*{num_blocks * (3 + 2 * count)}*({rows})"
    merge = _MERGE if count else ""
    return [
        block.build(_with_parts(_BLOCK), (rows, num_blocks, 1), _NUM_WARPS, scratch=scratch),
        reduce.build(_with_parts(_REDUCE) + merge, (rows, 1, 1), 4, scratch=scratch),
    ]


def _with_parts(body: str) -> str:
    """The addresses of the row's scratch memory, after the line that names the row."""
    head, _, rest = body.lstrip("\n").partition("\n")
    return f"{head}{_PARTS}{rest}"
