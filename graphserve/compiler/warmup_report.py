"""What a warm-up found and made, as a table and as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graphserve.artifacts import Artifact
from graphserve.progress import format_bytes

_HEAD = ("what", "built", "stored", "missing", "seconds", "size")


@dataclass(frozen=True)
class Row:
    """One artifact that a start needs. ``group``: ``plan``, ``weights``, ``tokenizer`` or the target.

    ``seconds`` is the time that its making took, now or earlier.
    """

    group: str
    name: str
    state: str  # "built", "stored" or "missing"
    key: str | None
    seconds: float
    num_bytes: int


@dataclass
class WarmupReport:
    """What a store holds for a model.

    Attributes:
        place: the store's folder or file.
        rows: one for each artifact that a start needs.
        artifacts: those that are there, by folder.
    """

    place: str
    rows: list[Row] = field(default_factory=list)
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def add(self, group: str, name: str, artifact: Artifact | None, was_there: bool) -> None:
        """Note one artifact. ``was_there``: it was found, not made now."""
        if artifact is None:
            self.rows.append(Row(group, name, "missing", None, 0.0, 0))
            return
        manifest = artifact.manifest
        self.artifacts[str(artifact.folder)] = artifact
        state = "stored" if was_there else "built"
        seconds = float(manifest.built.get("seconds", 0.0))
        self.rows.append(Row(group, name, state, manifest.key, seconds, manifest.num_bytes))

    @property
    def missing(self) -> list[str]:
        """What a start would have to compile."""
        return [row.name for row in self.rows if row.state == "missing"]

    @property
    def is_complete(self) -> bool:
        return not self.missing

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"store": self.place, "complete": self.is_complete, "artifacts": [vars(row) for row in self.rows]}

    def __str__(self) -> str:
        table = [_HEAD, *(self._line(group) for group in dict.fromkeys(row.group for row in self.rows))]
        widths = [max(len(line[i]) for line in table) for i in range(len(_HEAD))]
        lines = [f"store {self.place}"]
        for line in table:
            cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            lines.append("  " + "  ".join(cells))
        lines += [f"missing: {name}" for name in self.missing]
        lines.append("complete: a start compiles nothing" if self.is_complete else f"{len(self.missing)} missing")
        return "\n".join(lines)

    def _line(self, group: str) -> tuple[str, ...]:
        rows = [row for row in self.rows if row.group == group]
        counts = (sum(row.state == state for row in rows) for state in ("built", "stored", "missing"))
        seconds = f"{sum(row.seconds for row in rows):.1f}"
        return (group, *map(str, counts), seconds, format_bytes(sum(row.num_bytes for row in rows)))
