"""The end of a row kernel that quantizes: one scale a row from its largest value, see ``kernels.quantize``."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Refused
from graphserve.kernels.quantized_types import QUANTIZED_MAX, SMALLEST_ABSMAX
from graphserve.kernels.triton.expressions import limited, quantized
from graphserve.kernels.triton.kernel import KernelText
from graphserve.kernels.triton.rows import RowProgram


class QuantizedRows:
    """Text that writes rows to ``quantized_ptr`` and their scales to ``scale_ptr``.

    Args:
        text: the kernel being written.
        program: its rows.
        spec: the quantized tensor.
        target: decides how a value becomes fp8.
    """

    def __init__(self, text: KernelText, program: RowProgram, spec: ArgSpec, target: str) -> None:
        if spec.dtype not in QUANTIZED_MAX:
            raise Refused(f"quantized dtype {spec.dtype!r} has no Triton form: only {', '.join(QUANTIZED_MAX)}")
        text.constants(LIMIT=QUANTIZED_MAX[spec.dtype], SMALLEST=SMALLEST_ABSMAX)
        self._program, self._spec = program, spec
        self._quantized = quantized(text, limited("value * inverse", spec.dtype), spec.dtype, target)

    def whole(self, value: str) -> list[str]:
        """``value``: an fp32 expression of whole rows, 0 outside them."""
        lines = [f"value = {value}", "absmax = tl.max(tl.abs(value), axis=1, keep_dims=True)"]
        return [*lines, *self._scale(), *self._write()]

    def tiled(self, lines: list[str]) -> list[str]:
        """``lines`` define ``value`` for one tile; they run twice, for the largest value and for what is written."""
        largest = "absmax = tl.maximum(absmax, tl.max(tl.abs(value), axis=1, keep_dims=True))"
        return [
            "absmax = tl.zeros([ROWS, 1], tl.float32)",
            self._program.over_tiles([*lines, largest]),
            *self._scale(),
            self._program.over_tiles([*lines, *self._write()]),
        ]

    def _scale(self) -> list[str]:
        scale = self._program.store_row("scale_ptr", "absmax / LIMIT")
        return ["absmax = tl.maximum(absmax, SMALLEST)", "inverse = LIMIT / absmax", scale]

    def _write(self) -> list[str]:
        store = self._program.store("quantized_ptr", "QUANTIZED", self._spec, "quantized")
        return [f"quantized = {self._quantized}", store]
