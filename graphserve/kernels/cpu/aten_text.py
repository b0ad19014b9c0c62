"""C++ text of elementwise ATen ops over vectors, and of the reductions over a row (``templates/pointwise.h``)."""

from __future__ import annotations

# Storage type and kind of the lanes: f fp32, i int32, l int64, b truth as 0 or -1 in int32.
STORAGE = {
    "float32": ("float", "f"), "bfloat16": ("bf16", "f"), "int64": ("int64_t", "l"), "int32": ("int32_t", "i"),
    "int16": ("int16_t", "i"), "int8": ("int8_t", "i"), "uint8": ("uint8_t", "i"), "bool": ("uint8_t", "b"),
}  # fmt: skip
VECTORS = {"f": "vf", "i": "vi", "l": "vl", "b": "vi"}

# From one kind of lanes to another.
CONVERSIONS = {
    ("f", "i"): "__builtin_convertvector({0}, vi)",
    ("f", "l"): "__builtin_convertvector({0}, vl)",
    ("f", "b"): "({0} != 0.0f)",
    ("i", "f"): "__builtin_convertvector({0}, vf)",
    ("i", "l"): "__builtin_convertvector({0}, vl)",
    ("i", "b"): "({0} != 0)",
    ("l", "f"): "__builtin_convertvector({0}, vf)",
    ("l", "i"): "__builtin_convertvector({0}, vi)",
    ("l", "b"): "long_to_mask({0})",
    ("b", "f"): "mask_to_float({0})",
    ("b", "i"): "(-{0})",
    ("b", "l"): "mask_to_long({0})",
}


def _lanewise(function: str) -> str:
    return f"lanewise({{0}}, [](float a) {{{{ return {function}(a); }}}})"


# Results in floating point of floating-point operands.
FLOAT_UNARY = {
    "exp": "exp_of({0})",
    "exp2": _lanewise("exp2f"),
    "expm1": "expm1_of({0})",
    "log": _lanewise("logf"),
    "log2": _lanewise("log2f"),
    "sqrt": "vsqrt({0})",
    "rsqrt": "1.0f / vsqrt({0})",
    "reciprocal": "1.0f / {0}",
    "sin": _lanewise("sinf"),
    "cos": _lanewise("cosf"),
    "erf": _lanewise("erff"),
    "tanh": "tanh_of({0})",
    "sigmoid": "1.0f / (1.0f + exp_of(-{0}))",
    "silu": "{0} / (1.0f + exp_of(-{0}))",
    "floor": _lanewise("floorf"),
    "ceil": _lanewise("ceilf"),
}
GELU = {"none": "Gelu()({0})", "tanh": "GeluTanh()({0})"}
# Computed in floats.
FLOAT_ARITHMETIC = {
    "neg": "-{0}",
    "abs": "({0} < 0.0f ? -{0} : {0} + 0.0f)",  # + 0 turns -0 into 0
    "square": "fenced({0} * {0})",
    "relu": "Relu()({0})",
    "mul": "fenced({0} * {1})",
    "div": "{0} / {1}",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "maximum": "largest({0}, {1})",
    "minimum": "smallest({0}, {1})",
}
# Computed in the integer type of the result.
INT_ARITHMETIC = {
    "neg": "wrap_sub({0} - {0}, {0})",
    "abs": "({0} < 0 ? wrap_sub({0} - {0}, {0}) : {0})",
    "square": "wrap_mul({0}, {0})",
    "relu": "({0} < 0 ? {0} - {0} : {0})",
    "mul": "wrap_mul({0}, {1})",
    "add": "wrap_add({0}, {1})",
    "sub": "wrap_sub({0}, {1})",
    "maximum": "largest({0}, {1})",
    "minimum": "smallest({0}, {1})",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
    "bitwise_not": "~{0}",
}
CLAMPS = {"clamp_min": "maximum", "clamp_max": "minimum"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
LOGICAL = {"logical_and": "{0} & {1}", "logical_or": "{0} | {1}", "logical_not": "~{0}"}
COPIES = ("_to_copy", "clone", "alias", "detach", "contiguous", "to")
CONSTANTS = {"full_like": None, "zeros_like": 0, "ones_like": 1}
# Powers that are exact or that processors have an instruction for.
POWERS: dict[float, str] = {
    2.0: "fenced({0} * {0})", 3.0: "fenced({0} * {0} * {0})", 0.5: "vsqrt({0})", -0.5: "1.0f / vsqrt({0})",
    -1.0: "1.0f / {0}", 1.0: "{0}",
}  # fmt: skip

# Over the last dimension: how two partial results join, how lanes do, and the value of no element by kind.
REDUCTIONS: dict[str, tuple[str, str, dict[str, str]]] = {
    "sum": ("{0} + {1}", "fold_sum", {"f": "vf{}", "i": "vi{}", "l": "vl{}"}),
    "mean": ("{0} + {1}", "fold_sum", {"f": "vf{}"}),
    "amax": ("largest({0}, {1})", "fold_largest",
             {"f": "set1(-INFINITY)", "i": "set1i(INT32_MIN)", "l": "set1l(INT64_MIN)"}),
    "amin": ("smallest({0}, {1})", "fold_smallest",
             {"f": "set1(INFINITY)", "i": "set1i(INT32_MAX)", "l": "set1l(INT64_MAX)"}),
}  # fmt: skip
SOFTMAX = ("_softmax", "softmax")

SUPPORTED: frozenset[str] = frozenset(
    [*FLOAT_UNARY, *FLOAT_ARITHMETIC, *INT_ARITHMETIC, *CLAMPS, *COMPARISONS, *LOGICAL, *COPIES, *CONSTANTS]
    + [*REDUCTIONS, *SOFTMAX, "rsub", "pow", "where", "clamp", "masked_fill", "gelu"]
)
