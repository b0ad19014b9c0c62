"""Text that the sampler's kernels share: how a vocabulary is split, and functions that they call."""

from __future__ import annotations

import ast
import inspect
import textwrap

import msgspec

from graphserve.kernels.arg_spec import ArgSpec, Refused, require_unit_stride
from graphserve.kernels.sampling_rules import GROUP, UNIT_MASS, hash_bits
from graphserve.kernels.triton.kernel import KernelText, next_power_of_2

BLOCK_TOKENS = 4096  # of one program: 128 KiB of bf16 logits in flight for each 16 programs
MAX_VOCAB = 2**20  # the sum of so many tokens' integer masses fits int64

DISTANCE = """
@triton.jit
def distance_below(top, score):
    # An infinite largest score is at distance 0 from itself; the absolute value only clears a zero's sign.
    return tl.where(score == top, 0.0, tl.abs(top - score))
"""

# Distances are not negative, so their bits as int32 are in the same order as they are.
TOKEN_MASS = f"""
@triton.jit
def token_mass(code):
    return (tl.exp(-code.to(tl.float32, bitcast=True)) * {float(UNIT_MASS)}).to(tl.int64)
"""

# Triton has no log1p: below a quarter, -log(1 - u) is the series of 2 * atanh(u / (2 - u)), whose first term left out
# is 2e-8 of the sum.
GUMBEL_NOISE = """
@triton.jit
def gumbel_noise(ids, first, second):
    u = tl.minimum((hash_bits(ids, first, second).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994)
    s = u / (2.0 - u)
    q = s * s
    near_zero = 2.0 * s * (1.0 + q * (0.33333334 + q * (0.2 + q * 0.14285715)))
    return -tl.log(tl.where(u < 0.25, near_zero, -tl.log(1.0 - u)))
"""


def hash_function() -> str:
    """:func:`graphserve.kernels.sampling_rules.hash_bits` as the text of a ``@triton.jit`` function."""
    source = inspect.getsource(hash_bits)
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    parameters = ", ".join(argument.arg for argument in function.args.args)
    statements = function.body[1:]  # the docstring stays behind
    body = "\n".join(ast.get_source_segment(source, statement) or "" for statement in statements)
    return f"@triton.jit\ndef {function.name}({parameters}):\n{textwrap.indent(body, '    ')}"


class Vocabulary:
    """How the rows of a ``[R, V]`` tensor are split into blocks of one program each.

    Args:
        text: the kernel being written; gets the constants V, BLOCK and NUM_BLOCKS.
        rows: the tensor.
        name: of the tensor, for refusals.

    Raises:
        Refused: V is not a constant or too large, or rows are not contiguous.
    """

    def __init__(self, text: KernelText, rows: ArgSpec, name: str) -> None:
        self.size = rows.int_dim(-1)
        if len(rows.shape) != 2 or self.size > MAX_VOCAB:
            raise Refused(
                f"{name} has shape {rows.shape}: [rows, vocabulary] with at most {MAX_VOCAB} tokens is served"
            )
        require_unit_stride(rows, name)
        self.num_rows = rows.shape[0]
        self.block = max(GROUP, min(BLOCK_TOKENS, next_power_of_2(self.size)))
        self.num_blocks = -(-self.size // self.block)
        self.num_groups = -(-self.size // GROUP)
        text.constants(V=self.size, BLOCK=self.block, NUM_BLOCKS=self.num_blocks, ROW_STRIDE=rows.int_stride(0))


def require_shape(spec: ArgSpec, name: str, dtype: str, shape: tuple[int | str, ...]) -> None:
    """Refuse an argument that is not a contiguous tensor of this dtype and shape."""
    plain = ArgSpec(dtype, shape)
    if spec != msgspec.structs.replace(plain, strides=spec.strides, alignment=spec.alignment) or any(
        spec.stride(axis) != plain.stride(axis) for axis in range(len(shape)) if shape[axis] != 1
    ):
        given = f"{spec.dtype} {list(spec.shape)} with strides {spec.strides}"
        raise Refused(f"{name} is {given}: contiguous {dtype} {list(shape)} is served")
