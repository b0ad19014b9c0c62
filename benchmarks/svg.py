"""Charts as SVG text, written by hand: bars beside limits, and strips of spans along time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, LABELS, ROW = 900, 330, 22  # pixels: of a chart, of the names beside its bars, of a bar's height and its space
OURS, LIBRARY, LIMIT = "#2f6db3", "#b9bec6", "#c0392b"
_PALETTE = (
    "#2f6db3",
    "#e08a2c",
    "#3d9a57",
    "#c0392b",
    "#7d5ba6",
    "#8c6d4f",
    "#d46a9f",
    "#6b7280",
    "#9aa532",
    "#2a9fb0",
)


def bar_chart(
    title: str, rows: Mapping[str, Sequence[tuple[str, float]]], unit: str, limit: float, limit_name: str
) -> str:
    """Groups of horizontal bars, and the limit as a line.

    Args:
        rows: group → (series, value); the first series is ours.
        limit: same unit as the values.
    """
    most = max([limit, *(value for bars in rows.values() for _, value in bars)]) * 1.12
    scale = (WIDTH - LABELS - 20) / most
    parts, top = [], 66.0
    for name, bars in rows.items():
        parts.append(_text(LABELS - 10, top + ROW * len(bars) / 2 + 2, name, anchor="end"))
        for place, (series, value) in enumerate(bars):
            parts.append(_rect(LABELS, top, value * scale, ROW - 6, LIBRARY if place else OURS, f"{name}, {series}"))
            label = f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
            parts.append(_text(LABELS + value * scale + 5, top + 12, label, size=11))
            top += ROW
        top += 8
    x = LABELS + limit * scale
    parts.append(f'<line x1="{x:.1f}" y1="58" x2="{x:.1f}" y2="{top:.1f}" stroke="{LIMIT}" stroke-dasharray="4 3"/>')
    parts.append(_text(x, 52, f"{limit_name}: {limit:,.0f}", anchor="middle", size=11, fill=LIMIT))
    return _document(f"{title} ({unit})", parts, top + 10)


def strips(title: str, spans: Sequence[tuple[float, float, str, str]], num_strips: int = 8) -> str:
    """Spans along time, in strips one below the other, coloured by their kind.

    Args:
        spans: (begin, duration, name, kind) in microseconds, from 0.
    """
    end = max(begin + duration for begin, duration, _, _ in spans)
    each = end / num_strips
    scale = (WIDTH - 90) / each
    totals: dict[str, float] = {}
    for _, duration, _, kind in spans:
        totals[kind] = totals.get(kind, 0.0) + duration
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    colours = {kind: _PALETTE[place % len(_PALETTE)] for place, kind in enumerate(kinds)}
    parts, top = [], 52.0
    for place, kind in enumerate(kinds):
        x, y = 20 + 290 * (place % 3), top + 20 * (place // 3)
        parts += [_rect(x, y - 10, 12, 12, colours[kind], kind), _text(x + 18, y, f"{kind}: {totals[kind]:,.0f} us")]
    top += 20 * (-(-len(kinds) // 3)) + 6
    for strip in range(num_strips):
        left, y = strip * each, top + strip * 34
        parts.append(_text(66, y + 17, f"{left:,.0f} us", anchor="end", size=11))
        parts.append(f'<line x1="72" y1="{y + 24:.1f}" x2="{WIDTH - 18}" y2="{y + 24:.1f}" stroke="#999"/>')
        for begin, duration, name, kind in spans:
            first, last = max(begin, left), min(begin + duration, left + each)
            if last > first:
                x, width = 72 + (first - left) * scale, (last - first) * scale
                parts.append(_rect(x, y, width, 24, colours[kind], f"{name}: {duration:.2f} us at {begin:.2f}"))
    return _document(title, parts, top + num_strips * 34 + 10)


def _document(title: str, parts: Sequence[str], height: float) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>'
    return "\n".join([head, background, _text(20, 26, title, size=15), *parts, "</svg>", ""])


def _rect(x: float, y: float, width: float, height: float, fill: str, tip: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.2):.2f}" height="{height:.0f}" fill="{fill}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12, fill: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{escape(text)}</text>'
    )
