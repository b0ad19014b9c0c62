"""Entry of ``route``: each row's experts are chosen and weighted by one thread."""

from __future__ import annotations

from graphserve.kernels.arg_spec import Call, Refused, require_unit_stride
from graphserve.kernels.cpu.entries import Entry, call_template
from graphserve.kernels.cpu.kernel import (
    NUM_THREADS,
    cpp_float,
    cpp_type_of,
    pointer,
    require_same_dtype,
    rows_of,
)

# What a row needs lies on the stack: 16 bytes an expert.
_MAX_EXPERTS = 4096

_SCORES = {"softmax": "SoftmaxScores", "sigmoid": "SigmoidScores", "none": "PlainScores"}
_WEIGHTS = {"none": "PlainWeights", "sum": "SumWeights", "softmax": "SoftmaxWeights", "sigmoid": "SigmoidWeights"}


def route(call: Call) -> Entry:
    """Scores, choice and weights of the experts; of equal choices the one that ``torch.topk`` takes on a CPU."""
    logits, bias = call.tensor(0, "logits"), call.optional(1)
    weights, ids = call.outputs
    logits_type = require_same_dtype(("logits", logits))
    bias_type = require_same_dtype(("bias", bias)) if bias is not None else "float"
    weights_type = require_same_dtype(("weights", weights))
    if ids.dtype != "int64":
        raise Refused(f"expert ids must be int64, got {ids.dtype}")
    for name, spec in (("logits", logits), ("weights", weights), ("ids", ids), *((("bias", bias),) if bias else ())):
        require_unit_stride(spec, name)
    num_experts, top_k, num_groups = logits.int_dim(-1), call.attr("top_k"), call.attr("num_groups")
    if not 0 < top_k <= num_experts <= _MAX_EXPERTS:
        raise Refused(f"the best {top_k} of {num_experts} experts: at most {_MAX_EXPERTS} experts, at least one chosen")
    scores, normalize = call.attr("scores"), call.attr("normalize")
    if scores not in _SCORES or normalize not in _WEIGHTS:
        raise Refused(f"scores {scores!r} or normalize {normalize!r} is unknown: use {[*_SCORES]}, {[*_WEIGHTS]}")
    groups = (num_groups, call.attr("top_groups"), call.attr("group_top")) if num_groups > 1 else (1, 1, 1)
    size = num_experts // groups[0]
    if size * groups[0] != num_experts or not 0 < groups[1] <= groups[0] or not 0 < groups[2] <= size:
        raise Refused(
            f"{num_experts} experts in {groups[0]} groups, of which {groups[1]} stay by their {groups[2]} best"
        )
    rows = rows_of(logits)
    template_args = [
        *(logits_type, bias_type, weights_type, _SCORES[scores], _WEIGHTS[normalize]),
        *map(str, (num_experts, top_k, *groups)),
        *(rows.cpp_type, rows_of(weights).cpp_type, rows_of(ids).cpp_type),
    ]
    pointers = [
        *(pointer(logits, 0), pointer(bias, 1, cpp_type=bias_type)),
        *(pointer(weights, 2, const=False), pointer(ids, 3, const=False, cpp_type=cpp_type_of(ids))),
    ]
    floats = [cpp_float(call.attr(name)) for name in ("eps", "min_sum", "scale")]
    return Entry(("route",), call_template("route", template_args, [*pointers, rows.count, NUM_THREADS, *floats]))
