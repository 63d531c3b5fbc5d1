"""Draws a dashboard as Grafana lays it out: the same grid, units, legends, thresholds and stacking; light theme."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import isfinite, nan
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from tests.monitoring.panels import Panel

COLUMNS, ROW_PX, GAP_PX, WIDTH_PX, HEAD_PX = 24, 30, 8, 1200, 44
DPI = 100
COLOURS = 256
"""Of a picture's palette: lines and text, no photographs."""
PALETTE = ("#56A64B", "#E0B400", "#3274D9", "#FA6400", "#E02F44", "#8AB8FF", "#A352CC", "#37872D", "#B58C00", "#C4162A")
PAGE, PAPER, EDGE, INK, FAINT, ALERT = "#F4F5F5", "#FFFFFF", "#DADADD", "#24292E", "#6E7781", "#E02F44"
SMALL, NORMAL, LARGE = 6.5, 8.0, 19.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line; times in seconds since the picture's first moment."""

    name: str
    points: Points

    @property
    def last(self) -> float | None:
        """Grafana's `lastNotNull`."""
        return next((value for _, value in reversed(self.points) if isfinite(value)), None)


def shown(value: float, unit: str) -> str:
    """A number in one of the units that the dashboards use, as Grafana writes it."""
    match unit:
        case "s":
            for factor, name in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
                if abs(value) * factor >= 1 or name == "µs":
                    return f"{value * factor:.3g} {name}" if value else "0 s"
        case "percentunit":
            return f"{value * 100:.3g}%"
        case "reqps" | "cpm":
            return f"{value:.3g} {'req/s' if unit == 'reqps' else 'c/m'}"
        case _ if abs(value) >= 1000:
            return f"{value / 1000:.3g} K"
    return f"{value:.3g}"


def draw(path: Path, title: str, panels: Sequence[Panel], data: Mapping[str, Sequence[Series]], span_s: float) -> None:
    """One PNG of a dashboard; `data` has the series of each panel by its title."""
    height = HEAD_PX + max(panel.y + panel.height for panel in panels) * (ROW_PX + GAP_PX) + GAP_PX
    figure = Figure(figsize=(WIDTH_PX / DPI, height / DPI), dpi=DPI, facecolor=PAGE)
    sheet = Sheet(figure, height)
    sheet.text(GAP_PX * 2, HEAD_PX / 2, title, size=13, weight="bold")
    for panel in panels:
        _draw_panel(sheet, panel, data.get(panel.title, ()), span_s)
    drawn = io.BytesIO()
    figure.savefig(drawn, facecolor=PAGE)
    Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


class Sheet:
    """A figure whose places are pixels from the top left."""

    def __init__(self, figure: Figure, height: int) -> None:
        self.figure, self.height = figure, height

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        style = {"size": NORMAL, "color": INK, "va": "center", "ha": "left", **style}
        self.figure.text(x / WIDTH_PX, 1 - y / self.height, text, **style)

    def box(self, x: float, y: float, width: float, height: float) -> None:
        place = (x / WIDTH_PX, 1 - (y + height) / self.height)
        size = (width / WIDTH_PX, height / self.height)
        style: dict[str, Any] = {"boxstyle": "square,pad=0", "fc": PAPER, "ec": EDGE, "lw": 0.8, "zorder": -1}
        self.figure.add_artist(FancyBboxPatch(place, *size, **style))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        bottom = 1 - (y + height) / self.height
        return self.figure.add_axes((x / WIDTH_PX, bottom, width / WIDTH_PX, height / self.height))


def _draw_panel(sheet: Sheet, panel: Panel, series: Sequence[Series], span_s: float) -> None:
    column = (WIDTH_PX - GAP_PX) / COLUMNS
    x, y = GAP_PX + panel.x * column, HEAD_PX + panel.y * (ROW_PX + GAP_PX)
    width, height = panel.width * column - GAP_PX, panel.height * (ROW_PX + GAP_PX) - GAP_PX
    if panel.kind == "row":
        sheet.text(x + 4, y + height / 2, f"▾  {panel.title}", size=9.5, weight="bold")
        return
    sheet.box(x, y, width, height)
    sheet.text(x + 10, y + 14, panel.title, weight="bold")
    if not any(isfinite(value) for one in series for _, value in one.points):
        sheet.text(x + width / 2, y + height / 2, panel.quiet or "No data", ha="center", color=FAINT)
    elif panel.kind == "stat":
        _draw_stat(sheet, panel, series[0], (x, y, width, height))
    else:
        _draw_graph(sheet, panel, series, (x, y, width, height), span_s)


def _draw_stat(sheet: Sheet, panel: Panel, series: Series, place: tuple[float, float, float, float]) -> None:
    x, y, width, height = place
    value = series.last or 0.0
    colour = ALERT if panel.bound is not None and value >= panel.bound else PALETTE[0]
    axes = sheet.axes(x + 1, y + height * 0.66, width - 2, height * 0.34 - 1)
    axes.axis("off")
    axes.margins(x=0)
    times, values = zip(*series.points, strict=True)
    axes.plot(times, values, color=colour, lw=0.8)
    axes.fill_between(times, values, color=colour, alpha=0.12, lw=0)
    axes.set_ylim(0, None)
    sheet.text(x + width / 2, y + height * 0.48, shown(value, panel.unit), size=LARGE, ha="center", color=colour)


def _draw_graph(
    sheet: Sheet, panel: Panel, series: Sequence[Series], place: tuple[float, float, float, float], span_s: float
) -> None:
    x, y, width, height = place
    lines = _legend(sheet, series, (x, y, width, height))
    axes = sheet.axes(x + 62, y + 30, width - 76, height - 56 - lines * 14)
    _dress(axes, panel.unit, span_s)
    floor = [0.0] * max(len(one.points) for one in series)
    for one, colour in zip(series, cycle(PALETTE), strict=False):
        times, values = ([*part] for part in zip(*one.points, strict=True))
        if panel.is_stacked:
            top = [below + (value if isfinite(value) else 0) for below, value in zip(floor, values, strict=True)]
            known = [isfinite(value) for value in values]
            axes.fill_between(times, floor, top, where=known, color=colour, alpha=0.4, lw=0)
            axes.plot(times, [value if is_known else nan for value, is_known in zip(top, known, strict=True)],
                      color=colour, lw=1)  # fmt: skip
            floor = top
        else:
            axes.plot(times, values, color=colour, lw=1.2, marker=".", ms=2)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1e-9))
    if panel.bound is not None and panel.bound <= axes.get_ylim()[1]:
        axes.axhline(panel.bound, color=ALERT, lw=0.9, ls=(0, (6, 4)))


def _dress(axes: Axes, unit: str, span_s: float) -> None:
    axes.set_xlim(0, span_s)
    axes.grid(color="#E9EAEB", lw=0.6)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=unit == "none"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 1.5, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02d}"))


def _legend(sheet: Sheet, series: Sequence[Series], place: tuple[float, float, float, float]) -> int:
    """Names under the graph, as many in a line as fit. Returns how many lines that took."""
    x, y, width, height = place
    rows: list[list[tuple[float, str, str]]] = [[]]
    reached = 0.0
    for one, colour in zip(series, cycle(PALETTE), strict=False):
        needed = 26 + 5.6 * len(one.name)
        if reached + needed > width - 20 and rows[-1]:
            rows.append([])
            reached = 0
        rows[-1].append((reached, one.name, colour))
        reached += needed
    for number, row in enumerate(reversed(rows)):
        below = y + height - 12 - number * 14
        for offset, name, colour in row:
            sheet.text(x + 12 + offset, below, "━", size=SMALL, color=colour)
            sheet.text(x + 25 + offset, below, name, size=SMALL)
    return len(rows)
