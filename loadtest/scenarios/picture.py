"""Panels of points over time, side by side on one logarithmic scale, as SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 470.0, 330.0
LEFT, TOP, GAP = 62.0, 78.0, 28.0
COLOURS = ("#b3261e", "#1f5fa8", "#8a8f98")
"""Of the kinds, in order: told apart in grey and by the colour-blind as well."""


@dataclass(frozen=True, slots=True)
class Point:
    """Something that took `value_s`, `at_s` after the start. An open point marks what got no answer."""

    at_s: float
    value_s: float
    kind: str
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Scale:
    """Seconds to places inside a panel: linear to the right, logarithmic upwards."""

    end_s: float
    low_s: float
    high_s: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> Scale:
        """Whole decades around all values. Raises ValueError without points."""
        values = [max(point.value_s, 1e-3) for point in points]
        low, high = 10.0 ** math.floor(math.log10(min(values))), 10.0 ** math.ceil(math.log10(max(values)))
        return cls(max(point.at_s for point in points), low, max(high, 10 * low))

    def x(self, at_s: float) -> float:
        return WIDTH * at_s / self.end_s

    def y(self, value_s: float) -> float:
        share = math.log(max(value_s, self.low_s) / self.low_s) / math.log(self.high_s / self.low_s)
        return HEIGHT * (1 - share)

    @property
    def decades(self) -> list[float]:
        count = round(math.log10(self.high_s / self.low_s))
        return [self.low_s * 10.0**power for power in range(count + 1)]


def panels(title: str, drawn: Sequence[Panel], kinds: Sequence[str]) -> str:
    """The whole picture. Raises ValueError without points."""
    scale = Scale.of([point for panel in drawn for point in panel.points])
    width = LEFT + len(drawn) * (WIDTH + GAP)
    height = TOP + HEIGHT + 52
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        f'<text x="{LEFT:g}" y="24" font-size="16" font-weight="600">{escape(title)}</text>',
        *_legend(kinds),
    ]
    for place, panel in enumerate(drawn):
        lines += _panel(panel, kinds, scale, LEFT + place * (WIDTH + GAP), is_first=place == 0)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend(kinds: Sequence[str]) -> Iterator[str]:
    x = LEFT + 5
    for kind, colour in zip(kinds, COLOURS, strict=False):
        yield f'<circle cx="{x:g}" cy="44" r="4" fill="{colour}"/><text x="{x + 9:g}" y="48">{escape(kind)}</text>'
        x += 34 + 7 * len(kind)
    yield f'<circle cx="{x:g}" cy="44" r="3" fill="none" stroke="#555"/>'
    yield f'<text x="{x + 9:g}" y="48">refused, and when the client was told</text>'


def _panel(panel: Panel, kinds: Sequence[str], scale: Scale, left: float, *, is_first: bool) -> Iterator[str]:
    yield f'<g transform="translate({left:g} {TOP:g})">'
    yield f'<text x="0" y="-8" font-weight="600">{escape(panel.title)}</text>'
    yield f'<rect width="{WIDTH:g}" height="{HEIGHT:g}" fill="#fafafa" stroke="#ccc"/>'
    for value in scale.decades:
        y = scale.y(value)
        yield f'<line x2="{WIDTH:g}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        if is_first:
            yield f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{value:g} s</text>'
    step = 10 ** math.floor(math.log10(scale.end_s / 2))
    for at in range(math.floor(scale.end_s / step) + 1):
        yield f'<text x="{scale.x(at * step):.1f}" y="{HEIGHT + 18:g}" text-anchor="middle">{at * step:g}</text>'
    yield f'<text x="{WIDTH / 2:g}" y="{HEIGHT + 38:g}" text-anchor="middle">seconds since the load began</text>'
    for kind, colour in reversed(list(zip(kinds, COLOURS, strict=False))):  # the first kind lies on top
        yield from (_mark(point, colour, scale) for point in panel.points if point.kind == kind)
    yield "</g>"


def _mark(point: Point, colour: str, scale: Scale) -> str:
    look = f'fill="none" stroke="{colour}" r="2.5"' if point.is_open else f'fill="{colour}" r="3"'
    return f'<circle cx="{scale.x(point.at_s):.1f}" cy="{scale.y(point.value_s):.1f}" {look}/>'
