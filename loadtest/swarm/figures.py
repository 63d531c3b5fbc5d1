"""What a run's records come to: figures by band, SLO goals and whether they are met. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loadtest.samples import percentile
from loadtest.scenarios.goals import Goal
from loadtest.swarm.answer import Record


@dataclass(frozen=True)
class Figures:
    """Sums over records. Seconds; samples are unsorted."""

    asked: int
    served: int
    refusals: Counter[str]
    errors: Counter[str]
    tokens: int
    ttfts_s: Sequence[float]
    gaps_s: Sequence[float]
    tpots_s: Sequence[float]
    took_s: Sequence[float]

    @property
    def error_share(self) -> float | None:
        """Of all requests; a refusal (429, 503) is none."""
        return sum(self.errors.values()) / self.asked if self.asked else None

    @property
    def refused_share(self) -> float | None:
        return sum(self.refusals.values()) / self.asked if self.asked else None


def figures(records: Iterable[Record]) -> Figures:
    chosen = list(records)
    served = [record for record in chosen if record.is_served]
    return Figures(
        asked=len(chosen),
        served=len(served),
        refusals=Counter(f"{record.status} {record.code}" for record in chosen if record.is_refused),
        errors=Counter(f"{record.status or '–'} {record.code}" for record in chosen if record.is_error),
        tokens=sum(record.tokens for record in served),
        ttfts_s=[record.ttft_s for record in chosen if record.ttft_s is not None],
        gaps_s=[gap for record in chosen for gap in record.gaps_s],
        tpots_s=[record.tpot_s for record in served if record.tpot_s is not None],
        took_s=[record.took_s for record in served],
    )


def span_s(records: Sequence[Record]) -> float:
    """From the first request to the last answer; at least a millisecond."""
    if not records:
        return 0.001
    return max(0.001, max(r.at_s + r.took_s for r in records) - min(r.at_s for r in records))


def by_band(records: Iterable[Record]) -> dict[str, list[Record]]:
    """In the order in which the bands are served; those without a request are left out."""
    found: dict[str, list[Record]] = {"priority": [], "default": [], "flex": [], "batch": []}
    for record in records:
        found.setdefault(record.band, []).append(record)
    return {band: chosen for band, chosen in found.items() if chosen}


SLOS = {
    "ttft_p95_s": "TTFT p95",
    "itl_p95_s": "ITL p95",
    "tpot_p95_s": "TPOT p95",
    "e2e_p95_s": "E2E p95",
    "error_share": "share of errors",
    "refused_share": "share of refusals",
    "tokens_per_s": "tokens/s",
}
"""What can be promised, by the option's name (`--slo-ttft-p95-s`). All but the last are upper bounds."""


def goals(records: Sequence[Record], promised: Mapping[str, float]) -> list[Goal]:
    """Each promise beside what came out; batches have no part in them. What has no samples is missed."""
    interactive = [record for record in records if record.band != "batch"]
    seen = figures(interactive)
    got = {
        "ttft_p95_s": _p95(seen.ttfts_s),
        "itl_p95_s": _p95(seen.gaps_s),
        "tpot_p95_s": _p95(seen.tpots_s),
        "e2e_p95_s": _p95(seen.took_s),
        "error_share": seen.error_share,
        "refused_share": seen.refused_share,
        "tokens_per_s": seen.tokens / span_s(interactive),
    }
    return [
        Goal(
            SLOS[name],
            "≥" if name == "tokens_per_s" else "≤",
            target,
            got[name],
            unit=" s" if name.endswith("95_s") else "",
            digits=4 if name.endswith(("95_s", "share")) else 1,
        )
        for name, target in promised.items()
    ]


def _p95(samples: Sequence[float]) -> float | None:
    return percentile(samples, 0.95) if samples else None
