"""Triton text of elementwise ATen ops, and of the reductions over a row that a row kernel can hold."""

from __future__ import annotations

from collections.abc import Callable

from graphserve.kernels.arg_spec import Refused
from graphserve.kernels.triton.expressions import activation

# 0.5 * (1 - exp(-2x)) loses its digits near 0, where five terms of the series are exact to fp32.
TANH_HELPER = '''
@triton.jit
def tanh(x):
    """Hyperbolic tangent in fp32."""
    square = x * x
    series = 1.0 - square * (0.33333334 - square * (0.13333334 - square * (0.05396825 - square * 0.021869488)))
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.2, x * series, tl.where(x < 0.0, -large, large))
'''

_NAN = "propagate_nan=tl.PropagateNan.ALL"

# Results in floating point of floating-point operands.
FLOAT_UNARY = {
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "expm1": "tanh(0.5 * {0}) * (tl.exp({0}) + 1.0)",  # exp(x) - 1 loses its digits near 0, tanh does not
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "reciprocal": "1.0 / {0}",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "erf": "tl.erf({0})",
    "tanh": "tanh({0})",
    "sigmoid": activation("sigmoid", "{0}"),
    "silu": activation("silu", "{0}"),
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
}
# Computed in the result's own kind of number, floats or integers.
ARITHMETIC = {
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "square": "{0} * {0}",
    "relu": f"tl.maximum({{0}}, 0, {_NAN})",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "maximum": f"tl.maximum({{0}}, {{1}}, {_NAN})",
    "minimum": f"tl.minimum({{0}}, {{1}}, {_NAN})",
    "clamp_min": f"tl.maximum({{0}}, {{1}}, {_NAN})",
    "clamp_max": f"tl.minimum({{0}}, {{1}}, {_NAN})",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
LOGICAL = {
    "logical_and": "{0} & {1}", "logical_or": "{0} | {1}", "logical_not": "{0} == 0", "bitwise_not": "{0} == 0",
}  # fmt: skip
COPIES = ("_to_copy", "clone", "alias", "detach", "contiguous", "to")
# Powers that are exact or that processors have an instruction for.
POWERS: dict[float, str] = {
    2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}", 0.5: "tl.sqrt({0})", -0.5: "tl.rsqrt({0})", -1.0: "1.0 / {0}", 1.0: "{0}",
}  # fmt: skip

# Over the last dimension: how a row is reduced, and what stands where it has no element.
REDUCTIONS: dict[str, tuple[str, str]] = {
    "sum": ("tl.sum({0}, axis=1, keep_dims=True)", "0"),
    "mean": ("tl.sum({0}, axis=1, keep_dims=True) / D", "0"),
    "amax": ("tl.max({0}, axis=1, keep_dims=True)", 'float("-inf")'),
    "amin": ("tl.min({0}, axis=1, keep_dims=True)", 'float("inf")'),
}
SOFTMAX = ("_softmax", "softmax")

_SPECIAL = (
    "add",
    "sub",
    "rsub",
    "pow",
    "where",
    "clamp",
    "masked_fill",
    "gelu",
    "full_like",
    "zeros_like",
    "ones_like",
)
SUPPORTED: frozenset[str] = frozenset(
    [*FLOAT_UNARY, *ARITHMETIC, *COMPARISONS, *LOGICAL, *COPIES, *REDUCTIONS, *SOFTMAX, *_SPECIAL]
)


def gelu(approximate: str) -> Callable[[str], str]:
    """Text of ``aten.gelu`` for one of its two forms."""
    if approximate not in ("none", "tanh"):
        raise Refused(f"aten.gelu with approximate={approximate!r} has no Triton form")
    return lambda x: activation("gelu" if approximate == "none" else "gelu_tanh", x)
