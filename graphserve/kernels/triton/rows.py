"""Programs that work on whole rows: how many rows a program takes, how its tensors are addressed and masked."""

from __future__ import annotations

import textwrap

from graphserve.kernels.arg_spec import ArgSpec, Dim, Refused, require_unit_stride, row_layout
from graphserve.kernels.triton.kernel import KernelText, next_power_of_2

MAX_WIDTH = 16384
# Elements a program holds where rows are short, and elements a thread holds where they are long: two 128-bit loads
# of bf16. Fewer leave bandwidth unused, more cost registers that hide latency.
_PROGRAM_ELEMENTS = 2048
_THREAD_ELEMENTS = 16


class RowProgram:
    """Text of a program over ``[ROWS, BLOCK]`` elements: some rows, and all their columns padded to a power of two, or
    a tile of them.

    Args:
        text: the kernel being written.
        rows: a tensor whose leading dimensions are the rows.
        width: columns of a row.
        target: decides the lanes of a warp.
        tile: columns of one program at most; by default a program takes whole rows.

    Raises:
        Refused: whole rows that are longer than 16384.
    """

    def __init__(self, text: KernelText, rows: ArgSpec, width: int, target: str, tile: int | None = None) -> None:
        if tile is None and width > MAX_WIDTH:
            raise Refused(f"rows of {width} elements are longer than {MAX_WIDTH}")
        self._text = text
        self._width = width
        self.count: Dim = row_layout(rows).count
        self.block = min(max(16, next_power_of_2(width)), tile or MAX_WIDTH)
        self.rows = max(1, (tile or _PROGRAM_ELEMENTS) // self.block)
        if isinstance(self.count, int):
            self.rows = min(self.rows, next_power_of_2(self.count))
        lanes = 64 if target.startswith("hip") else 32
        thread_elements = _THREAD_ELEMENTS // 2 if tile else _THREAD_ELEMENTS
        self.num_warps = min(16, max(1, self.block * self.rows // (lanes * thread_elements)))
        text.constants(D=width, BLOCK=self.block, ROWS=self.rows)
        self._masks_columns = width % self.block != 0
        self._masks_rows = self.rows > 1 and self.count != self.rows

    @property
    def grid(self) -> tuple[Dim, Dim, Dim]:
        """One program for each ``ROWS`` rows and tile of columns."""
        rows = f"cdiv({self.count}, {self.rows})" if self.rows > 1 else self.count
        return (rows, -(-self._width // self.block), 1)

    @property
    def scalars(self) -> tuple[str, ...]:
        """Step scalars that the masks read."""
        if not self._masks_rows or isinstance(self.count, int):
            return ()
        return tuple(name for name in ("T", "R", "S") if name in self.count)

    @property
    def head(self) -> str:
        """Statements that define ``row``, ``column`` and, where some elements lie outside, ``mask``."""
        tile = "tl.program_id(1) * BLOCK + " if self._width > self.block else ""
        return "\n".join([self.row_head, *self._columns(tile)])

    @property
    def row_head(self) -> str:
        """The statement that defines ``row``."""
        if self.rows == 1:
            return "row = tl.program_id(0).to(tl.int64)"
        return "row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]"

    def over_tiles(self, lines: list[str]) -> str:
        """A loop over the tiles of the program's rows, with ``column`` and ``mask`` of each."""
        inside = "\n".join([*self._columns("start + "), *lines])
        return f"for start in range(0, D, BLOCK):\n{textwrap.indent(inside, '    ')}"

    def _columns(self, start: str) -> list[str]:
        lines = [
            f"column = ({start}tl.arange(0, BLOCK))[None, :]" if start else "column = tl.arange(0, BLOCK)[None, :]"
        ]
        if self._masks_columns and self._masks_rows:
            lines.append(f"mask = (column < D) & (row < {self.count})")
        elif self.is_masked:
            lines.append("mask = column < D" if self._masks_columns else f"mask = row < {self.count}")
        return lines

    @property
    def is_masked(self) -> bool:
        """Whether some elements of a program lie outside the tensor."""
        return self._masks_columns or self._masks_rows

    def mask_for(self, has_rows: bool, has_columns: bool) -> str:
        """The keyword that keeps a load of a broadcast tensor inside: of the axes it has, those that are padded."""
        conditions = ["(column < D)"] * (self._masks_columns and has_columns)
        conditions += [f"(row < {self.count})"] * (self._masks_rows and has_rows)
        return f", mask={' & '.join(conditions)}, other=0" if conditions else ""

    def load(self, pointer: str, constant: str, spec: ArgSpec, row: str = "row") -> str:
        """Expression of the program's elements of ``spec`` (shape ``[ROWS, BLOCK]``, the tensor's dtype, 0 outside).

        ``row``: an int64 variable with the index of each row in ``spec``.
        """
        require_unit_stride(spec, pointer)
        mask = ", mask=mask, other=0" if self.is_masked else ""
        return f"tl.load({pointer} + {self._text.row_start(constant, spec, row)} + column{mask})"

    def load_row(self, pointer: str) -> str:
        """Expression of one value a row of a contiguous tensor (shape ``[ROWS, 1]``, or a scalar of one row)."""
        mask = f", mask=row < {self.count}, other=0" if self._masks_rows else ""
        return f"tl.load({pointer} + row{mask})"

    def load_columns(self, pointer: str) -> str:
        """Expression of one value a column (shape ``[1, BLOCK]``), for weights and biases."""
        mask = ", mask=column < D, other=0" if self._masks_columns else ""
        return f"tl.load({pointer} + column{mask})"

    def store(self, pointer: str, constant: str, spec: ArgSpec, value: str) -> str:
        """Statement that writes ``value`` to the program's elements of ``spec``, rounded to its dtype."""
        require_unit_stride(spec, pointer)
        mask = ", mask=mask" if self.is_masked else ""
        return f"tl.store({pointer} + {self._text.row_start(constant, spec)} + column, {value}{mask})"

    def store_row(self, pointer: str, value: str) -> str:
        """Statement that writes one value a row (``value`` of shape ``[ROWS, 1]``) to a contiguous tensor."""
        mask = f", mask=row < {self.count}" if self._masks_rows else ""
        return f"tl.store({pointer} + row + tl.zeros([ROWS, 1], tl.int64), {value}{mask})"
