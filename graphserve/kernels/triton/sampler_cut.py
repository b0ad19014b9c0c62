"""``sampling_cut``: what top-k, top-p and min-p keep, found by search instead of a sort.

One program a row looks for the largest distance at which the tokens that lie nearer do not yet reach a target: their
number for top-k, their mass for top-p. It sets the bits of that distance from the highest to the lowest one; each asks
for one sum. Three things keep the sums short. The largest scores of groups of neighbours are tokens too, so the same
search over them alone bounds the answer. Only tokens within the bound are copied to scratch memory and searched. And a
program keeps the first ones of them in registers. Masses are integers, so sums do not depend on their order.
"""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call
from graphserve.kernels.triton.kernel import KernelText, TritonKernel
from graphserve.kernels.triton.sampler_text import DISTANCE, TOKEN_MASS, Vocabulary, require_shape

_CHUNK = 2048  # tokens that a search holds in registers; typical top-k and top-p leave fewer
_NUM_WARPS = 16

_SEARCH = """
@triton.jit
def amounts(code, IS_MASS: tl.constexpr):
    return token_mass(tl.minimum(code, INFINITY_CODE)) if IS_MASS else tl.full(code.shape, 1, tl.int64)


@triton.jit
def search(codes, count, target, IS_MASS: tl.constexpr):
    # The largest code such that the amounts of all smaller ones stay below the target.
    place = tl.arange(0, CHUNK)
    held = tl.load(codes + place, mask=place < count, other=NO_CODE)
    held_amounts = amounts(held, IS_MASS)
    found = 0
    for step in range(31):
        tried = found | (1 << (30 - step))
        before = tl.sum(tl.where(held < tried, held_amounts, 0), axis=0)
        for at in range(CHUNK, count, CHUNK):
            code = tl.load(codes + at + place, mask=at + place < count, other=NO_CODE)
            before += tl.sum(tl.where(code < tried, amounts(code, IS_MASS), 0), axis=0)
        found = tl.where(before < target, tried, found)
    return found


@triton.jit
def mass_within(codes, count, limit):
    total = tl.full((), 0, tl.int64)
    for at in range(0, count, CHUNK):
        place = at + tl.arange(0, CHUNK)
        code = tl.load(codes + place, mask=place < count, other=NO_CODE)
        total += tl.sum(tl.where(code <= limit, amounts(code, True), 0), axis=0)
    return total


@triton.jit
def top_p_target(top_p, total):
    exact = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(exact, 1)
"""

_BODY = """
row = tl.program_id(0).to(tl.int64)
scores = scores_ptr + row * ROW_STRIDE
codes = codes_ptr + row * V
group = tl.arange(0, GROUPS_BLOCK)
peak = tl.load(group_max_ptr + row * GROUPS + group, mask=group < GROUPS, other=-float("inf"))
has_nan = tl.max((peak != peak).to(tl.int32), axis=0) > 0
top = tl.where(has_nan, float("nan"), tl.max(peak, axis=0))
top_k = tl.load(top_k_ptr + row)
top_p = tl.load(top_p_ptr + row)
cut = tl.abs(tl.load(log_min_p_ptr + row)).to(tl.int32, bitcast=True)
is_possible = top > -float("inf")
has_top_k = is_possible & (top_k > 0) & (top_k < V)
has_top_p = is_possible & (top_p < 1.0)
if has_top_k | has_top_p:
    tl.store(codes + group, distance_below(top, peak).to(tl.int32, bitcast=True), mask=group < GROUPS)
    tl.debug_barrier()
    bound = cut
    target = tl.full((), 0, tl.int64)
    if has_top_k:
        bound = tl.minimum(bound, search(codes, GROUPS, top_k.to(tl.int64), False))
    else:
        total = tl.full((), 0, tl.int64)
        for at in range(0, V, BLOCK):
            column = at + tl.arange(0, BLOCK)
            score = tl.load(scores + column, mask=column < V, other=-float("inf"))
            code = distance_below(top, score).to(tl.int32, bitcast=True)
            total += tl.sum(tl.where(code <= cut, token_mass(code), 0), axis=0)
        target = top_p_target(top_p, total)
        bound = tl.minimum(bound, search(codes, GROUPS, target, True))
    tl.debug_barrier()
    count = 0
    for at in range(0, V, BLOCK):
        column = at + tl.arange(0, BLOCK)
        score = tl.load(scores + column, mask=column < V, other=-float("inf"))
        code = distance_below(top, score).to(tl.int32, bitcast=True)
        is_near = ((code <= bound) & (column < V)).to(tl.int32)
        tl.store(codes + count + tl.cumsum(is_near, axis=0) - 1, code, mask=is_near > 0)
        count += tl.sum(is_near, axis=0)
    tl.debug_barrier()
    if has_top_k:
        cut = tl.minimum(cut, search(codes, count, top_k.to(tl.int64), False))
        if has_top_p:
            target = top_p_target(top_p, mass_within(codes, count, cut))
    if has_top_p:
        cut = tl.minimum(cut, search(codes, count, target, True))
tl.store(row_max_ptr + row, top)
tl.store(cut_ptr + row, tl.minimum(cut, INFINITY_CODE).to(tl.float32, bitcast=True))
"""


def sampling_cut(call: Call, target: str) -> TritonKernel:
    """The largest distance that each row keeps; see :func:`graphserve.kernels.sampling.sampling_cut`."""
    scores = call.tensor(0, "scores")
    text = KernelText(call)
    vocabulary = Vocabulary(text, scores, "scores")
    rows = vocabulary.num_rows
    require_shape(scores, "scores", "float32", (rows, vocabulary.size))
    groups = vocabulary.num_groups
    for index, (name, dtype, shape) in enumerate(
        [
            ("group_max", "float32", (rows, groups)),
            ("top_k", "int64", (rows,)),
            ("top_p", "float32", (rows,)),
            ("log_min_p", "float32", (rows,)),
        ],
        start=1,
    ):
        require_shape(call.tensor(index, name), name, dtype, shape)
    for index, name in enumerate(("scores", "group_max", "top_k", "top_p", "log_min_p")):
        text.pointer(f"{name}_ptr", index)
    for index, name in enumerate(("row_max", "cut")):
        require_shape(call.outputs[index], name, "float32", (rows,))
        text.output(f"{name}_ptr", index)
    text.scratch("codes_ptr", "int32")
    groups_block = max(16, 1 << (groups - 1).bit_length())
    text.constants(GROUPS=groups, GROUPS_BLOCK=groups_block, CHUNK=_CHUNK, NO_CODE=0x7FFFFFFF, INFINITY_CODE=0x7F800000)
    for helper in (DISTANCE, TOKEN_MASS, _SEARCH):
        text.helper(helper)
    return text.build(_BODY, (rows, 1, 1), _NUM_WARPS, scratch=f"4*{vocabulary.size}*({rows})")
