"""``gs.route``: one program a row, the best experts taken one after the other from registers."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call, Refused, require_unit_stride
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, next_power_of_2, require_float

_MAX_EXPERTS = 1024

_SCORES = {
    "softmax": "shifted = tl.exp(logits - tl.max(logits, 0))\nscore = shifted / tl.sum(shifted, 0)",
    "sigmoid": "score = tl.sigmoid(logits)",
    "none": "score = logits",
}

_GROUPS = """
group = expert // GROUP_SIZE
groups = tl.arange(0, GROUPS_BLOCK)
ranks = tl.full((GROUPS_BLOCK,), float("-inf"), tl.float32)
for i in tl.static_range(NUM_GROUPS):
    left = tl.where(group == i, choice, float("-inf"))
    rank = 0.0
    for j in tl.static_range(GROUP_TOP):
        rank += tl.max(left, 0)
        left = tl.where(expert == tl.argmax(left, 0), float("-inf"), left)
    ranks = tl.where(groups == i, rank, ranks)
kept = tl.full((BLOCK,), float("-inf"), tl.float32)
for i in tl.static_range(TOP_GROUPS):
    best = tl.argmax(ranks, 0)
    kept = tl.where(group == best, choice, kept)
    ranks = tl.where(groups == best, float("-inf"), ranks)
choice = kept
"""

_CHOOSE = """
place = tl.arange(0, PLACES)
ids = tl.zeros((PLACES,), tl.int32)
weights = tl.full((PLACES,), {absent}, tl.float32)
for i in tl.static_range(TOP_K):
    best = tl.argmax(choice, 0)
    ids = tl.where(place == i, best, ids)
    weights = tl.where(place == i, tl.sum(tl.where(expert == best, score, 0.0), 0), weights)
    choice = tl.where(expert == best, float("-inf"), choice)
"""

# From the chosen scores to weights; places beyond top_k hold what changes neither sum nor maximum.
_NORMALIZE = {
    "none": ("0.0", ""),
    "sigmoid": ("0.0", "weights = tl.sigmoid(weights)\n"),
    "sum": ("0.0", "weights = weights / tl.maximum(tl.sum(weights, 0) + EPS, MIN_SUM)\n"),
    "softmax": ('float("-inf")', "weights = tl.exp(weights - tl.max(weights, 0))\nweights /= tl.sum(weights, 0)\n"),
}


def route(call: Call, target: str) -> TritonKernel:
    """The kernel of ``gs.route``. A tie goes to the expert with the lower id."""
    logits, bias = call.tensor(0, "logits"), call.optional(1)
    require_float(("logits", logits), ("bias", bias), ("weights", call.outputs[0]))
    require_unit_stride(logits, "logits")
    num_experts, top_k, num_groups = logits.int_dim(-1), call.attr("top_k"), call.attr("num_groups")
    if num_experts > _MAX_EXPERTS:
        raise Refused(f"{num_experts} experts are more than {_MAX_EXPERTS}")
    scores, normalize = call.attr("scores"), call.attr("normalize")
    if scores not in _SCORES or normalize not in _NORMALIZE:
        raise Refused(f"scores {scores!r} or normalize {normalize!r} is unknown: use {[*_SCORES]}, {[*_NORMALIZE]}")
    text = KernelText(call)
    block = max(32, next_power_of_2(num_experts))
    text.constants(E=num_experts, BLOCK=block, TOP_K=top_k, PLACES=next_power_of_2(top_k))
    text.pointer("logits_ptr", 0)
    lines = [
        "row = tl.program_id(0).to(tl.int64)",
        "expert = tl.arange(0, BLOCK)",
        f"at = logits_ptr + {text.row_start('LOGITS', logits)} + expert",
        'logits = tl.load(at, mask=expert < E, other=float("-inf")).to(tl.float32)',
        _SCORES[scores],
    ]
    if text.pointer("bias_ptr", 1):
        lines.append("choice = score + tl.load(bias_ptr + expert, mask=expert < E, other=0).to(tl.float32)")
    else:
        lines.append("choice = score")
    lines.append('choice = tl.where(expert < E, choice, float("-inf"))')
    if num_groups > 1:
        text.constants(
            NUM_GROUPS=num_groups, GROUP_SIZE=num_experts // num_groups, GROUPS_BLOCK=next_power_of_2(num_groups),
            GROUP_TOP=call.attr("group_top"), TOP_GROUPS=call.attr("top_groups"),
        )  # fmt: skip
        lines.append(_GROUPS)
    absent, normalized = _NORMALIZE[normalize]
    if normalize == "sum":
        text.constants(EPS=float(call.attr("eps")), MIN_SUM=float(call.attr("min_sum")))
    lines += [_CHOOSE.format(absent=absent), normalized]
    if call.attr("scale") != 1:
        text.constants(SCALE=float(call.attr("scale")))
        lines.append("weights *= SCALE")
    text.output("weights_ptr", 0)
    text.output("ids_ptr", 1)
    lines.append("tl.store(weights_ptr + row * TOP_K + place, weights, mask=place < TOP_K)")
    lines.append("tl.store(ids_ptr + row * TOP_K + place, ids.to(tl.int64), mask=place < TOP_K)")
    rows = call.outputs[1]
    count = rows.shape[0] if len(rows.shape) == 2 else None
    if count is None:
        raise Refused(f"logits must be [rows, experts], got {logits.shape}")
    return text.build("\n".join(lines), (count, 1, 1), 1 if block <= 256 else 4)
