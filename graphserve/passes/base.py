"""What a pass is: a pattern, a check that gives the reason of a refusal, and a replacement.

A pass holds no state. ``pattern`` looks at one node and answers with a :class:`Match` or None; a pass whose pattern is
a property of the whole graph gives ``find`` instead. ``check`` answers None when the rewrite is legal and one sentence
otherwise. ``replacement`` inserts new nodes through the context and answers which old node each of them replaces; the
runner (``compiler/pipeline.py``) swaps the users, compares shapes, erases what is dead, counts and times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import fx

if TYPE_CHECKING:
    from graphserve.passes.context import PassContext

Tier = Literal["exact", "approximate"]


@dataclass(frozen=True)
class Match:
    """One place where a pattern fits.

    Attributes:
        root: The node the match is reported under.
        nodes: Every node that the match explains; new nodes name them as their sources.
        captures: What the pattern found out, by name.
    """

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    captures: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]


def always_legal(match: Match, ctx: PassContext) -> None:
    """The check of a pass whose pattern alone makes the rewrite legal."""


@dataclass(frozen=True)
class Pass:
    """One rewrite of the graph.

    Attributes:
        name: Shown in reports; the file's name.
        replacement: Inserts the new nodes and returns ``{old node: new node}``.
        pattern: Looks at one node.
        find: Looks at the whole graph, for patterns that are no property of one node.
        check: Why a match must be left alone, or None.
        tier: ``exact``: every result has the same bits. ``approximate``: results may differ by rounding.
        tolerance: For an approximate pass, the largest difference it may make, in units of the result dtype's eps
            times the largest magnitude of the tensor.
    """

    name: str
    replacement: Callable[[Match, PassContext], dict[fx.Node, fx.Node]]
    pattern: Callable[[fx.Node], Match | None] | None = None
    find: Callable[[fx.Graph], Iterable[Match]] | None = None
    check: Callable[[Match, PassContext], str | None] = always_legal
    tier: Tier = "exact"
    tolerance: float = 0.0

    def matches(self, graph: fx.Graph) -> Iterable[Match]:
        """Matches in graph order, found lazily: an earlier replacement is visible to a later pattern."""
        if self.find is not None:
            yield from self.find(graph)
            return
        assert self.pattern is not None
        for node in list(graph.nodes):
            if not node._erased and (match := self.pattern(node)) is not None:
                yield match
