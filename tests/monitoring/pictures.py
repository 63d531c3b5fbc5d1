"""`python -m tests.monitoring.pictures DIRECTORY`: what each dashboard shows of the scene, one PNG each.

There is no Grafana in the package registries that this project installs from; its queries are asked of a real
Prometheus, and drawn.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from math import nan
from pathlib import Path

from tests.monitoring.conftest import find_binaries
from tests.monitoring.drawing import Series, draw
from tests.monitoring.panels import Panel, dashboards
from tests.monitoring.prometheus import Prometheus
from tests.monitoring.scene import staged

SCRAPE_S = 5
RATE_S = 4 * SCRAPE_S
"""Grafana's `$__rate_interval` for so short a time."""
SPAN_S = 180.0


async def series_of(prometheus: Prometheus, panel: Panel, start: float, end: float) -> list[Series]:
    """All on the same moments: what is not known then is not a number."""
    moments = [float(moment) for moment in range(0, int(end - start), SCRAPE_S)]
    found = []
    for target in panel.targets:
        for one in await prometheus.query_range(target.query(RATE_S), start, start + moments[-1], SCRAPE_S):
            known = {round(float(moment) - start): float(value) for moment, value in one["values"]}
            found.append(Series(target.name(one["metric"]), [(when, known.get(round(when), nan)) for when in moments]))
    return found


async def draw_all(directory: Path, span_s: float) -> list[str]:
    """Returns which panels are empty, having said nothing of why that may be."""
    bare = []
    with tempfile.TemporaryDirectory() as place:
        async with staged(find_binaries(Path(place)), Path(place), SCRAPE_S) as scene:
            start, end = time.time(), time.time() + span_s
            await scene.play(span_s)
            for name, (title, panels) in dashboards().items():
                data = {panel.title: await series_of(scene.prometheus, panel, start, end) for panel in panels}
                bare += [panel.title for panel in panels if panel.targets and not (data[panel.title] or panel.quiet)]
                draw(directory / f"{name}.png", title, panels, data, end - start)
    return bare


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.monitoring.pictures", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--span", type=float, default=SPAN_S, metavar="SECONDS")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    bare = asyncio.run(draw_all(options.directory, options.span))
    for title in bare:
        print(f"empty, and does not say why: {title}", file=sys.stderr)
    return 1 if bare else 0


if __name__ == "__main__":
    sys.exit(main())
