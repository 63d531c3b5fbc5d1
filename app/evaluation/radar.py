"""A radar picture of several variants, each against its dense sibling, as SVG. Pure.

After the CAP radar of MoE-CAP (https://arxiv.org/abs/2412.07067): cost, accuracy and performance in one figure, larger
is better on every axis. Each variant has a small picture of its own; the dashed polygon is the dense sibling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from app.card import Card

COLUMNS = 3
CELL_WIDTH, CELL_HEIGHT = 345, 270
RADIUS = 80.0
CENTRE_Y = 150
OUTERMOST = 2.0  # times the dense sibling; what is better still is drawn at the rim
RINGS = (0.5, 1.0, 1.5, 2.0)
INK, GRID, FILL = "#1f2328", "#c8ccd1", "#0969da"


@dataclass(frozen=True, slots=True)
class Figure:
    """One variant: its name, a line below it, and its ratios to the dense sibling by axis (None: not measured)."""

    name: str
    note: str
    ratios: Mapping[str, float | None]


def ratios(card: Card, dense: Card) -> dict[str, float | None]:
    """By axis, how many times as good as the dense sibling; times, sizes and costs count inversely.

    TTFT and tokens/s are those of one stream, tokens per dollar follow from the most streams at a time.
    """
    ttft, lone, busy = _speed(card)
    dense_ttft, dense_lone, dense_busy = _speed(dense)
    return {
        "quality": card.relative_quality,
        "first token": _by(dense_ttft, ttft),
        "tokens/s": _by(lone, dense_lone),
        "tokens per $": _by(busy, dense_busy),
        "memory": _by(dense.memory_bytes, card.memory_bytes),
        "size": _by(dense.size_bytes, card.size_bytes),
    }


def _speed(card: Card) -> tuple[float | None, float | None, float | None]:
    """TTFT and tokens/s with the fewest streams, tokens/s with the most."""
    if not card.speed:
        return None, None, None
    lone, busy = min(card.speed, key=lambda one: one.streams), max(card.speed, key=lambda one: one.streams)
    return lone.ttft_p50_s, lone.tokens_per_s, busy.tokens_per_s


def _by(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def radar(figures: Sequence[Figure]) -> str:
    """The picture, with a title for those who cannot see it."""
    columns = max(1, min(COLUMNS, len(figures)))
    width, height = columns * CELL_WIDTH, max(1, math.ceil(len(figures) / columns)) * CELL_HEIGHT
    cells = "\n".join(
        f'<g transform="translate({index % columns * CELL_WIDTH} {index // columns * CELL_HEIGHT})">{_cell(figure)}</g>'
        for index, figure in enumerate(figures)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' font-family="system-ui, sans-serif" font-size="11" fill="{INK}">\n'
        f"<title>Variants against their dense sibling; larger is better on every axis</title>\n"
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{cells}\n</svg>\n'
    )


def _cell(figure: Figure) -> str:
    axes = list(figure.ratios)
    middle = CELL_WIDTH / 2
    own = _polygon([value or 0.0 for value in figure.ratios.values()])
    parts = [
        f'<text x="{middle}" y="20" text-anchor="middle" font-size="14" font-weight="600">{escape(figure.name)}</text>',
        f'<text x="{middle}" y="36" text-anchor="middle" fill="#59636e">{escape(figure.note)}</text>',
        *(f'<polygon points="{_polygon([ring] * len(axes))}" fill="none" stroke="{GRID}"/>' for ring in RINGS),
        f'<polygon points="{own}" fill="{FILL}" fill-opacity="0.25" stroke="{FILL}" stroke-width="2"/>',
        f'<polygon points="{_polygon([1.0] * len(axes))}" fill="none" stroke="{INK}" stroke-dasharray="4 3"/>',
        *(_label(axis, value, index, len(axes)) for index, (axis, value) in enumerate(figure.ratios.items())),
    ]
    return "\n".join(parts)


def _label(axis: str, value: float | None, index: int, count: int) -> str:
    x, y = _point(OUTERMOST + 0.3, index, count)
    anchor = "middle" if abs(x - CELL_WIDTH / 2) < 1 else "start" if x > CELL_WIDTH / 2 else "end"
    shown = "not measured" if value is None else f"{value:.2f}×"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(axis)}'
        f'<tspan x="{x:.1f}" dy="12" fill="#59636e">{shown}</tspan></text>'
    )


def _polygon(values: Sequence[float]) -> str:
    points = (_point(min(value, OUTERMOST), index, len(values)) for index, value in enumerate(values))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _point(value: float, index: int, count: int) -> tuple[float, float]:
    """The first axis points up, the others follow clockwise."""
    angle = 2 * math.pi * index / count - math.pi / 2
    distance = RADIUS * value / OUTERMOST
    return CELL_WIDTH / 2 + distance * math.cos(angle), CENTRE_Y + distance * math.sin(angle)
