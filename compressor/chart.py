"""A bar chart as SVG: one bar a label. For figures of a model's layers; no library is needed for that."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 300, 52, 40, 46
TICKS = 5


def bars(title: str, labels: Sequence[str], values: Sequence[float], along: str, upward: str, most: float = 1.0) -> str:
    """An SVG of values from 0 to `most`; `along` and `upward` say what the axes are. Values above `most` are cut."""
    width, height = WIDTH - LEFT - 12, HEIGHT - TOP - BOTTOM
    step = width / max(1, len(values))
    every = max(1, -(-len(labels) // 16))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 20, title, size=14),
        _text(LEFT, 38, upward),
        _text(LEFT + width / 2, HEIGHT - 6, along, "middle"),
    ]
    for tick in range(TICKS + 1):
        y = TOP + height * (1 - tick / TICKS)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + width}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{most * tick / TICKS:.2g}", "end"))
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        tall = height * min(max(value / most, 0.0), 1.0)
        x = LEFT + i * step
        parts.append(
            f'<rect x="{x + 0.1 * step:.1f}" y="{TOP + height - tall:.1f}" width="{0.8 * step:.1f}" '
            f'height="{tall:.1f}" fill="#3b6ea5"><title>{escape(label)}: {value:.4g}</title></rect>'
        )
        if i % every == 0:
            parts.append(_text(x + step / 2, TOP + height + 14, label, "middle"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, said: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(said)}</text>'
