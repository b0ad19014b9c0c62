"""Heads of one token in registers: the columns that rotate as two halves or as pairs, and the columns that do not."""

from __future__ import annotations

from dataclasses import dataclass

from graphserve.kernels.arg_spec import Refused
from graphserve.kernels.triton.kernel import KernelText, next_power_of_2

STYLES = ("half", "interleaved", "interleaved_to_half")


@dataclass(frozen=True)
class HeadColumns:
    """How the columns of a head are held: ``rotary`` of them as ``first`` and ``second`` (the two members of each
    rotated pair), the others as ``rest``.

    Attributes:
        dim: columns of a head.
        rotary: how many rotate, 0 for none.
        style: see :func:`graphserve.kernels.rope.rotate`.
        prefix: of the names of column indices, so that a kernel can hold heads of two sizes.
    """

    dim: int
    rotary: int
    style: str
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise Refused(f"rope style {self.style!r} has no Triton form: only {', '.join(STYLES)}")
        if self.rotary % 2 or self.rotary > self.dim:
            raise Refused(f"{self.rotary} rotary columns: they must be even and at most the head's {self.dim}")

    @property
    def parts(self) -> list[str]:
        """The register tiles of a head."""
        return ["first", "second"] * (self.rotary > 0) + ["rest"] * (self.dim > self.rotary)

    @property
    def block(self) -> int:
        """Columns held, padding included."""
        half, rest = self.rotary // 2, self.dim - self.rotary
        return 2 * next_power_of_2(half) * (half > 0) + next_power_of_2(rest) * (rest > 0)

    def define(self, text: KernelText) -> list[str]:
        """Constants and statements for the column indices ``half``, ``pair`` and ``rest`` that the parts need."""
        lines = []
        if self.rotary:
            half = self.rotary // 2
            text.constants(HALF=half, HALF_BLOCK=next_power_of_2(half))
            if self._reads_halves or self._writes_halves:
                lines.append("half = tl.arange(0, HALF_BLOCK)[None, :]")
            if not (self._reads_halves and self._writes_halves):
                lines.append("pair = tl.arange(0, 2 * HALF_BLOCK)[None, :]")
        if self.dim > self.rotary:
            rest = self.dim - self.rotary
            text.constants(**{self._rest.upper(): rest, f"{self._rest.upper()}_BLOCK": next_power_of_2(rest)})
            lines.append(f"{self._rest} = tl.arange(0, {self._rest.upper()}_BLOCK)[None, :]")
        return lines

    def load(self, name: str, pointer: str, mask: str = "", height: str = "1") -> list[str]:
        """Statements for ``name_first``, ``name_second`` and ``name_rest`` in fp32 from the columns at ``pointer``.

        Args:
            name: prefix of the variables.
            pointer: expression of the rows' starts, of ``height`` rows.
            mask: condition on the rows, empty for all.
            height: rows of the tile, for the pairs' reshape.
        """
        lines = self._load_rotary(name, pointer, mask, height, self._reads_halves)
        if self.dim > self.rotary:
            condition = self._mask(self._rest, self._rest.upper(), self.dim - self.rotary, mask)
            at = f"{pointer} + {self._rest_start}{condition}{', other=0.0' * bool(condition)}"
            lines.append(f"{name}_rest = tl.load({at}).to(tl.float32)")
        return lines

    def load_table(self, name: str, pointer: str) -> list[str]:
        """Statements for one row of a table, whose columns are those of the result: ``name_first``, ``name_second``."""
        return self._load_rotary(name, pointer, "", "1", self._writes_halves)

    def store(self, pointer: str, name: str, value: dict[str, str], mask: str, height: str) -> list[str]:
        """Statements that write ``value`` (an expression for each part) to the head's columns at ``pointer``.

        ``name``, ``mask`` and ``height`` are those of :meth:`load`.
        """
        lines = []
        if self.rotary and self._writes_halves:
            condition = self._mask("half", "HALF", self.rotary // 2, mask)
            lines.append(f"tl.store({pointer} + half, {value['first']}{condition})")
            lines.append(f"tl.store({pointer} + HALF + half, {value['second']}{condition})")
        elif self.rotary:
            condition = self._mask("pair", "2 * HALF", self.rotary // 2, mask)
            joined = f"tl.join({value['first']}, {value['second']})"
            lines.append(f"{name}_pairs = tl.reshape({joined}, [{height}, 2 * HALF_BLOCK])")
            lines.append(f"tl.store({pointer} + pair, {name}_pairs{condition})")
        if self.dim > self.rotary:
            condition = self._mask(self._rest, self._rest.upper(), self.dim - self.rotary, mask)
            lines.append(f"tl.store({pointer} + {self._rest_start}, {value['rest']}{condition})")
        return lines

    def rotate(self, name: str) -> list[str]:
        """Statements that turn ``name_first`` and ``name_second`` by ``cos_*`` and ``sin_*``."""
        if not self.rotary:
            return []
        return [
            f"{name}_turned = {name}_first * cos_first - {name}_second * sin_first",
            f"{name}_second = {name}_second * cos_second + {name}_first * sin_second",
            f"{name}_first = {name}_turned",
        ]

    @property
    def _rest(self) -> str:
        return f"{self.prefix}rest"

    @property
    def _rest_start(self) -> str:
        return f"2 * HALF + {self._rest}" if self.rotary else self._rest

    @property
    def _reads_halves(self) -> bool:
        return self.style == "half"

    @property
    def _writes_halves(self) -> bool:
        return self.style != "interleaved"

    def _load_rotary(self, name: str, pointer: str, mask: str, height: str, halves: bool) -> list[str]:
        if not self.rotary:
            return []
        width = self.rotary // 2
        if halves:
            condition = self._mask("half", "HALF", width, mask)
            other = ", other=0.0" * bool(condition)
            return [
                f"{name}_first = tl.load({pointer} + half{condition}{other}).to(tl.float32)",
                f"{name}_second = tl.load({pointer} + HALF + half{condition}{other}).to(tl.float32)",
            ]
        condition = self._mask("pair", "2 * HALF", width, mask)
        other = ", other=0.0" * bool(condition)
        return [
            f"{name}_pairs = tl.load({pointer} + pair{condition}{other}).to(tl.float32)",
            f"{name}_first, {name}_second = tl.split(tl.reshape({name}_pairs, [{height}, HALF_BLOCK, 2]))",
        ]

    def _mask(self, column: str, limit: str, width: int, rows: str) -> str:
        columns = "" if width == next_power_of_2(width) else f"({column} < {limit})"
        conditions = [c for c in (columns, rows and f"({rows})") if c]
        return f", mask={' & '.join(conditions)}" if conditions else ""
