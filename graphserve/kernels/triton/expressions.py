"""Pieces of kernel text that several families share: activations, rounding, quantization of rows.

Values are fp32 unless their text says otherwise.
"""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Refused
from graphserve.kernels.quantized_types import QUANTIZED_MAX
from graphserve.kernels.triton.kernel import TL_DTYPES, KernelText

# fp32 → the byte of e4m3 (no infinities), for processors without the instruction. Adding 0x7ffff and the lowest kept
# bit to the fp32 bits rounds to three mantissa bits, ties to even. Below 2^-6 codes count steps of 2^-9; adding 2^23
# makes the processor round to a whole number of them.
E4M3_HELPER = '''
@triton.jit
def fp32_to_e4m3(x):
    """The e4m3 byte of each fp32 value in -448..448, rounded to the nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    small = (tl.abs(x) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 0x3C800000, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
'''

# 1.5 * 2^23: adding it to a value below 2^22 leaves no fraction bits, so the sum is rounded to the nearest even.
_ROUND_HELPER = '''
@triton.jit
def round_half_even(x):
    """The nearest whole number, ties to even; |x| below 2^22."""
    return (x + 12582912.0) - 12582912.0
'''

_ACTIVATIONS = {
    "silu": "{x} * tl.sigmoid({x})",
    "gelu": "0.5 * {x} * (1.0 + tl.erf({x} * 0.7071067811865476))",
    # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
    "gelu_tanh": "{x} * tl.sigmoid(1.5957691216057308 * ({x} + 0.044715 * {x} * {x} * {x}))",
    "relu": "tl.maximum({x}, 0.0)",
    "relu2": "tl.maximum({x}, 0.0) * tl.maximum({x}, 0.0)",
    "sigmoid": "tl.sigmoid({x})",
    "quick_gelu": "{x} * tl.sigmoid(1.702 * {x})",
    "none": "{x}",
}


def activation(act: str, x: str) -> str:
    """Expression of an activation of the fp32 variable ``x``.

    Raises:
        Refused: the activation has no Triton form.
    """
    if act not in _ACTIVATIONS:
        raise Refused(f"activation {act!r} has no Triton form: only {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[act].format(x=x)


def round_to(dtype: str, value: str) -> str:
    """The fp32 expression of ``value`` rounded to a float dtype."""
    if dtype == "float32":
        return value
    return f"{value if value.isidentifier() else f'({value})'}.to({TL_DTYPES[dtype]}).to(tl.float32)"


def stores_bits(dtype: str, target: str) -> bool:
    """Whether values of this dtype are made in integers, because the target has no instruction that rounds to them."""
    return dtype == "float8_e4m3fn" and target in ("cuda:80", "hip:gfx942")


def stored_type(spec: ArgSpec, target: str) -> str | None:
    """Type under which a kernel writes a tensor, where it is not the tensor's own."""
    return "u8" if stores_bits(spec.dtype, target) else None


def quantized(text: KernelText, value: str, dtype: str, target: str) -> str:
    """Expression of ``value`` (fp32, already within the type's limits) as int8 or e4m3, rounded to the nearest even."""
    if dtype == "int8":
        text.helper(_ROUND_HELPER)
        return f"round_half_even({value}).to(tl.int8)"
    if stores_bits(dtype, target):
        text.helper(E4M3_HELPER)
        return f"fp32_to_e4m3({value})"
    return f"({value}).to({TL_DTYPES[dtype]})"


def limited(value: str, dtype: str) -> str:
    """``value`` within the limits of a quantized type."""
    limit = QUANTIZED_MAX[dtype]
    return f"tl.minimum(tl.maximum({value}, {-limit}), {limit})"
