"""The panels of the committed dashboards, as Grafana would read them from their files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).parents[2] / "deploy/grafana/dashboards"
LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")
EVERYTHING = {"$model": ".*", "$variant": ".*"}
"""What the variables of a dashboard stand for while nothing is chosen."""


@dataclass(frozen=True)
class Target:
    """One query; `legend` names its series by their labels, in double braces."""

    expr: str
    legend: str

    def query(self, rate_interval_s: int) -> str:
        """What Grafana sends, with everything chosen."""
        text = self.expr.replace("$__rate_interval", f"{rate_interval_s}s")
        for name, value in EVERYTHING.items():
            text = text.replace(name, value)
        return text

    def name(self, labels: Mapping[str, str]) -> str:
        """As Grafana names a series; a label that it has not is nothing."""
        return LABEL.sub(lambda found: labels.get(found[1], ""), self.legend)


@dataclass(frozen=True)
class Panel:
    """`kind` is row, stat or timeseries; the place is in Grafana's grid: 24 columns, rows of 30 pixels.

    `quiet` is written on it where there is nothing to show; `bound` is where its threshold stands.
    """

    kind: str
    title: str
    x: int
    y: int
    width: int
    height: int
    unit: str = ""
    quiet: str = ""
    bound: float | None = None
    is_stacked: bool = False
    targets: tuple[Target, ...] = ()

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Panel:
        place, defaults = found["gridPos"], found.get("fieldConfig", {}).get("defaults", {})
        steps = defaults.get("thresholds", {}).get("steps", [])
        return cls(
            kind=found["type"],
            title=found["title"],
            x=place["x"],
            y=place["y"],
            width=place["w"],
            height=place["h"],
            unit=defaults.get("unit", ""),
            quiet=defaults.get("noValue", ""),
            bound=next((step["value"] for step in steps if step.get("value") is not None), None),
            is_stacked=defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal",
            targets=tuple(Target(target["expr"], target["legendFormat"]) for target in found.get("targets", [])),
        )


def dashboards() -> dict[str, tuple[str, list[Panel]]]:
    """Title and panels, by the file's name; rows are panels without targets."""
    found = {}
    for file in sorted(DASHBOARDS.glob("*.json")):
        read = json.loads(file.read_text(encoding="utf-8"))
        found[file.stem] = read["title"], [Panel.read(panel) for panel in read["panels"]]
    return found
