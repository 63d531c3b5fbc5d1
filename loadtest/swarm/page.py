"""A run on one page: goals, figures by band, and what happened when, as HTML with inline SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import accumulate

from loadtest.samples import percentile
from loadtest.scenarios.goals import Goal
from loadtest.scenarios.picture import Panel, Point, panels
from loadtest.swarm.answer import Record
from loadtest.swarm.figures import Figures, by_band, figures, span_s

BUCKETS = 60
WIDTH, HEIGHT, LEFT, TOP = 470.0, 110.0, 62.0, 30.0

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1c1e; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.35rem; margin-bottom: .2rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { color: #55595f; margin: 0 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .28rem .5rem; text-align: right; border-bottom: 1px solid #e3e5e8; font-weight: normal; }
th { color: #55595f; } th:first-child, td:first-child { text-align: left; }
.missed { color: #b3261e; font-weight: 600; } .met { color: #1a6b3c; }
td { white-space: nowrap; } .numbers { font-size: .87em; }
svg { max-width: 100%; height: auto; display: block; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1rem; align-items: start; }
"""


def page(title: str, records: Sequence[Record], judged: Sequence[Goal]) -> str:
    """The whole page. A run without a request has tables and no pictures."""
    interactive = [record for record in records if record.band != "batch"]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(summary(interactive))}</p>",
        _goals(judged),
        "<h2>By band</h2>",
        '<div class="numbers">'
        + _table(_HEADER, [_row(band, figures(found)) for band, found in by_band(records).items()])
        + "</div>",
        *_ends(figures(records)),
        *_pictures(interactive),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def summary(records: Sequence[Record]) -> str:
    """One line of what a run came to."""
    seen = figures(records)
    speed = seen.tokens / span_s(records)
    return (
        f"{seen.asked:,} requests in {span_s(records):,.1f} s: {seen.served:,} served, "
        f"{sum(seen.refusals.values()):,} refused, {sum(seen.errors.values()):,} failed; {speed:,.1f} tokens/s"
    )


_HEADER = (
    *("", "asked", "served", "refused", "failed", "TTFT p50", "p95", "p99", "ITL p50", "p95"),
    *("TPOT p50", "p95", "E2E p50", "p95"),
)


def _row(band: str, seen: Figures) -> list[str]:
    counts = (seen.asked, seen.served, sum(seen.refusals.values()), sum(seen.errors.values()))
    asked = (
        *((seen.ttfts_s, q) for q in (0.5, 0.95, 0.99)),
        *((samples, q) for samples in (seen.gaps_s, seen.tpots_s, seen.took_s) for q in (0.5, 0.95)),
    )
    return [escape(band), *(f"{count:,}" for count in counts), *(_duration(samples, q) for samples, q in asked)]


def _duration(samples: Sequence[float], q: float) -> str:
    if not samples:
        return "–"
    value = percentile(samples, q)
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _goals(judged: Sequence[Goal]) -> str:
    if not judged:
        return ""
    rows = []
    for goal in judged:
        *cells, _ = map(escape, goal.row())
        rows.append([*cells, '<span class="met">met</span>' if goal.is_met else '<span class="missed">missed</span>'])
    return "<h2>Goals</h2>" + _table(("", "target", "got", ""), rows)


def _ends(seen: Figures) -> Iterable[str]:
    """How requests ended that were not served, if any."""
    rows = [["refused", escape(code), f"{count:,}"] for code, count in seen.refusals.most_common()]
    rows += [["failed", escape(code), f"{count:,}"] for code, count in seen.errors.most_common()]
    if rows:
        yield "<h2>Not served</h2>"
        yield _table(("", "status and code", "requests"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _pictures(records: Sequence[Record]) -> Iterable[str]:
    if not records:
        return
    start_s = min(record.at_s for record in records)
    bucket_s = max(0.001, span_s(records) / BUCKETS)
    bands = list(by_band(records))
    yield '<h2>When</h2><div class="row">'
    points = list(_points(records, start_s))
    if points and max(point.at_s for point in points) > 0:
        yield panels("Time to first token, by arrival", [Panel("", points)], bands)
    outcomes = {"served": "is_served", "refused": "is_refused", "failed": "is_error"}
    asked = {
        name: _rate([r.at_s - start_s for r in records if getattr(r, kind)], bucket_s)
        for name, kind in outcomes.items()
    }
    yield "<div>"
    yield chart("Tokens per second", {"tokens/s": _rate(_tokens_at(records, start_s), bucket_s)}, bucket_s)
    yield chart("Requests per second, by arrival", asked, bucket_s)
    yield chart("Requests in flight", {"in flight": in_flight(records, start_s, bucket_s)}, bucket_s)
    yield "</div></div>"


def _points(records: Iterable[Record], start_s: float) -> Iterable[Point]:
    for record in records:
        if record.ttft_s is not None:
            yield Point(record.at_s - start_s, record.ttft_s, record.band)
        elif record.is_refused:
            yield Point(record.at_s - start_s, record.took_s, record.band, is_open=True)


def _tokens_at(records: Iterable[Record], start_s: float) -> list[float]:
    """When each chunk with tokens came."""
    return [
        at_s
        for record in records
        if record.ttft_s is not None
        for at_s in accumulate(record.gaps_s, initial=record.at_s - start_s + record.ttft_s)
    ]


def _rate(times_s: Iterable[float], bucket_s: float) -> list[float]:
    """Events per second in each bucket; what lies on the end counts for the last."""
    counts = [0.0] * BUCKETS
    for at_s in times_s:
        counts[min(BUCKETS - 1, int(at_s / bucket_s))] += 1 / bucket_s
    return counts


def in_flight(records: Iterable[Record], start_s: float, bucket_s: float) -> list[float]:
    """The mean number of requests under way in each bucket."""
    held = [0.0] * BUCKETS
    for record in records:
        begin, end = ((at - start_s) / bucket_s for at in (record.at_s, record.at_s + record.took_s))
        for bucket in range(int(begin), min(BUCKETS, math.ceil(end))):
            held[bucket] += min(end, bucket + 1) - max(begin, bucket)
    return held


def chart(title: str, series: Mapping[str, Sequence[float]], bucket_s: float) -> str:
    """Lines over time on one linear scale from zero. A series that is zero throughout is not drawn."""
    drawn = {name: values for name, values in series.items() if any(values)}
    top = _nice(max((max(values) for values in drawn.values()), default=1.0))
    width, height = LEFT + WIDTH + 12, TOP + HEIGHT + 24
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12">',
        f'<text x="{LEFT:g}" y="18" font-weight="600">{escape(title)}</text>',
        f'<rect x="{LEFT:g}" y="{TOP:g}" width="{WIDTH:g}" height="{HEIGHT:g}" fill="#fafafa" stroke="#ccc"/>',
        f'<text x="{LEFT - 8:g}" y="{TOP + 5:g}" text-anchor="end">{top:,g}</text>',
        f'<text x="{LEFT - 8:g}" y="{TOP + HEIGHT:g}" text-anchor="end">0</text>',
        f'<text x="{LEFT + WIDTH:g}" y="{height - 8:g}" text-anchor="end">{BUCKETS * bucket_s:,.0f} s</text>',
    ]
    colours = dict(zip(series, ("#1f5fa8", "#b3261e", "#8a8f98"), strict=False))
    for at, (name, values) in enumerate(drawn.items()):
        places = " ".join(f"{_x(i):.1f},{TOP + HEIGHT * (1 - value / top):.1f}" for i, value in enumerate(values))
        lines.append(f'<polyline points="{places}" fill="none" stroke="{colours[name]}" stroke-width="1.6"/>')
        if len(drawn) > 1:
            place = f'x="{LEFT + WIDTH - 70 * (len(drawn) - at - 1):g}" y="18" text-anchor="end"'
            lines.append(f'<text {place} fill="{colours[name]}">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>"])


def _x(bucket: int) -> float:
    return LEFT + WIDTH * (bucket + 0.5) / BUCKETS


def _nice(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if value <= step * power)
