"""``sampling_cut``: what top-k, top-p and min-p keep, found by search instead of a sort.

One program a row looks for the largest distance at which the tokens that lie nearer do not yet reach a target: their
number for top-k, their mass for top-p. It sets the bits of that distance from the highest to the lowest one, two a
step; a step sums what lies before each value of its bits at once. Three things keep the sums short. The answer is
bounded first: for top-k by the same search over the largest scores of groups of neighbours, which are tokens too; for
top-p alone, which reads the whole row for its mass, by the mass within a few fixed distances. Only groups that reach
into the bound are read, and only their tokens within it are copied to scratch memory and searched. And a program keeps
the first ones of them in registers. Masses are integers, so sums do not depend on their order.
"""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call
from graphserve.kernels.sampling_rules import GROUP
from graphserve.kernels.triton.kernel import KernelText, TritonKernel
from graphserve.kernels.triton.sampler_text import DISTANCE, TOKEN_MASS, Vocabulary, require_shape

_FEW = 1024  # tokens that a search holds in registers; typical top-k and top-p leave fewer
_MANY = 8192  # that a longer search holds, one bit a step, which takes fewer registers
_PASS = 2048  # tokens of one step of a pass over all of them
_GROUPS_AT_ONCE = 32  # whose tokens are read in one step
_NUM_WARPS = 8
_STEP_BITS = 2

_SEARCH = """
@triton.jit
def amounts(code, IS_MASS: tl.constexpr):
    return token_mass(tl.minimum(code, INFINITY_CODE)) if IS_MASS else tl.full(code.shape, 1, tl.int32)


@triton.jit
def sums_before(code, amount, tried):
    return tl.sum(tl.where(code[None, :] < tried[:, None], amount[None, :], 0), axis=1)


@triton.jit
def search_few(codes, count, target, IS_MASS: tl.constexpr):
    place = tl.arange(0, FEW)
    code = tl.load(codes + place, mask=place < count, other=NO_CODE)
    amount = amounts(code, IS_MASS)
    digit = tl.arange(0, DIGITS).to(tl.int64)
    found = 0
    for step in range(NUM_STEPS):
        tried = tl.minimum(found + (digit << (STEP_BITS * (NUM_STEPS - 1 - step))), NO_CODE).to(tl.int32)
        before = sums_before(code, amount, tried)
        found = tl.max(tl.where(before < target, tried, 0), axis=0)
    return found


@triton.jit
def search_many(codes, count, target, IS_MASS: tl.constexpr):
    place = tl.arange(0, MANY)
    held = tl.load(codes + place, mask=place < count, other=NO_CODE)
    held_amounts = amounts(held, IS_MASS)
    found = 0
    for step in range(31):
        tried = found | (1 << (30 - step))
        before = tl.where(held < tried, held_amounts, 0)
        for at in range(MANY, count, MANY):
            code = tl.load(codes + at + place, mask=at + place < count, other=NO_CODE)
            before += tl.where(code < tried, amounts(code, IS_MASS), 0)
        found = tl.where(tl.sum(before, axis=0) < target, tried, found)
    return found


@triton.jit
def search(codes, count, target, IS_MASS: tl.constexpr):
    # The largest code such that the amounts of all smaller ones stay below the target.
    if count <= FEW:
        found = search_few(codes, count, target, IS_MASS)
    else:
        found = search_many(codes, count, target, IS_MASS)
    return found


@triton.jit
def mass_within(codes, count, limit):
    total = tl.zeros([FEW], tl.int64)
    for at in range(0, count, FEW):
        place = at + tl.arange(0, FEW)
        code = tl.load(codes + place, mask=place < count, other=NO_CODE)
        total += tl.where(code <= limit, amounts(code, True), 0)
    return tl.sum(total, axis=0)


@triton.jit
def top_p_target(top_p, total):
    exact = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(exact, 1)
"""

_BODY = """
row = tl.program_id(0).to(tl.int64)
scores = scores_ptr + row * ROW_STRIDE
codes = codes_ptr + row * (V + GROUPS)
near_groups = codes + V
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
        bound = tl.minimum(bound, search(codes, GROUPS, top_k, False))
    else:
        within_1 = tl.zeros([PASS], tl.int64)
        within_4 = tl.zeros([PASS], tl.int64)
        within_9 = tl.zeros([PASS], tl.int64)
        within_cut = tl.zeros([PASS], tl.int64)
        for at in range(0, V, PASS):
            column = at + tl.arange(0, PASS)
            score = tl.load(scores + column, mask=column < V, other=-float("inf"))
            distance = distance_below(top, score)
            code = distance.to(tl.int32, bitcast=True)
            mass = tl.where(code <= cut, token_mass(code), 0)
            within_1 += tl.where(distance < 1.0, mass, 0)
            within_4 += tl.where(distance < 4.0, mass, 0)
            within_9 += tl.where(distance < 9.0, mass, 0)
            within_cut += mass
        target = top_p_target(top_p, tl.sum(within_cut, axis=0))
        if tl.sum(within_1, axis=0) >= target:
            nearer = 1.0
        elif tl.sum(within_4, axis=0) >= target:
            nearer = 4.0
        elif tl.sum(within_9, axis=0) >= target:
            nearer = 9.0
        else:
            nearer = float("inf")
        bound = tl.minimum(bound, tl.full((), nearer, tl.float32).to(tl.int32, bitcast=True))
    nearest = tl.load(codes + group, mask=group < GROUPS, other=NO_CODE)
    is_near_group = ((nearest <= bound) & (group < GROUPS)).to(tl.int32)
    tl.store(near_groups + tl.cumsum(is_near_group, axis=0) - 1, group, mask=is_near_group > 0)
    num_near = tl.sum(is_near_group, axis=0)
    tl.debug_barrier()
    count = 0
    for at in range(0, num_near, GROUPS_AT_ONCE):
        place = at + tl.arange(0, GROUPS_AT_ONCE)
        read = tl.load(near_groups + place, mask=place < num_near, other=GROUPS)
        column = read[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        score = tl.load(scores + column, mask=column < V, other=-float("inf"))
        code = distance_below(top, score).to(tl.int32, bitcast=True)
        code = tl.ravel(tl.where(column < V, code, NO_CODE))
        is_near = (code <= bound).to(tl.int32)
        tl.store(codes + count + tl.cumsum(is_near, axis=0) - 1, code, mask=is_near > 0)
        count += tl.sum(is_near, axis=0)
    tl.debug_barrier()
    if has_top_k:
        cut = tl.minimum(cut, search(codes, count, top_k, False))
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
    text.constants(GROUP=GROUP, GROUPS=groups, GROUPS_BLOCK=groups_block, GROUPS_AT_ONCE=_GROUPS_AT_ONCE)
    text.constants(FEW=_FEW, MANY=_MANY, PASS=_PASS)
    text.constants(STEP_BITS=_STEP_BITS, DIGITS=1 << _STEP_BITS, NUM_STEPS=-(-31 // _STEP_BITS))
    text.constants(NO_CODE=0x7FFFFFFF, INFINITY_CODE=0x7F800000)
    for helper in (DISTANCE, TOKEN_MASS, _SEARCH):
        text.helper(helper)
    return text.build(_BODY, (rows, 1, 1), _NUM_WARPS, scratch=f"{4 * (vocabulary.size + groups)}*({rows})")
