"""The page that compares a model's variants by their cards: Markdown, written by a command, never by hand. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from app.card import Card, Estimate, Speed, TaskName, Verdict
from app.evaluation.radar import Figure, ratios
from app.evaluation.tasks import TASKS

MIB = 1024**2
NONE = "–"
NOTABLY = 0.95  # what is within five percent of the dense sibling's is not called slower
CASCADE_QUALITY = 0.97
DISTURBED = 0.1
INTERVALS = (
    "Intervals hold 95 % of 1,000 resamplings of the texts and items. Relative quality is the mean of exp(−KL) and of"
    " the share of each task's score that is kept; a task's score is the share of its items answered right."
)


@dataclass(frozen=True, slots=True)
class Row:
    """A variant with its card, and the recipe that made it."""

    variant: str
    recipe: str
    card: Card

    @property
    def is_offered(self) -> bool:
        """Whether a worker served it here, and it passed its gate."""
        return bool(self.card.speed) and self.verdict.passed

    @property
    def verdict(self) -> Verdict:
        return self.card.gate or Verdict(passed=True)

    def speed(self, *, lone: bool) -> Speed | None:
        choose = min if lone else max
        return choose(self.card.speed, key=lambda speed: speed.streams, default=None)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """The radar's figures of all variants but the dense one, which comes first in `rows`."""
    dense = rows[0].card
    return [Figure(row.variant, _note(row), ratios(row.card, dense)) for row in rows[1:]]


def _note(row: Row) -> str:
    if not row.card.speed:
        return "not served here" if row.card.reason else "speed not measured"
    return "passes its gate" if row.verdict.passed else "by name only: fails its gate"


def page(model: str, rows: Sequence[Row], picture: str) -> str:
    """Markdown. `rows` begin with the dense sibling; `picture` is the SVG's name beside the page."""
    # Where the figures compare nothing there is no advice to give.
    doubts = [*_mixed(rows), *_disturbed(rows)]
    parts = [
        f"# {model}: which variant should I run?",
        "Written by `sluice evaluate` from the cards in the variants' manifests.",
        *(doubts or _advice(rows)),
        f"![Each variant against the dense one, larger is better]({picture})" if len(rows) > 1 else "",
        "## Cost and performance",
        _table(
            ("variant", *_performance_head(rows), "memory MiB", "size MiB", "$ per million tokens"), rows, _performance
        ),
        *_slower(rows),
        "## Quality, against the dense variant",
        _table(
            ("variant", "gate", "relative", "KL nats/token", "JS nats/token", "top-1", "perplexity ×", *TASKS),
            rows,
            _quality,
        ),
        INTERVALS,
        *_sparse(rows),
        *_cascade(rows),
        *_missing(rows),
        "## How it was measured",
        _measured(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _mixed(rows: Sequence[Row]) -> list[str]:
    """Cards of several runs may stand side by side; quality compares only on the same text and items."""
    measured = [row.card for row in rows if row.card.quality]
    kinds = {(card.text_sha256, card.seed) for card in measured}
    counts = {_items(card) for card in measured} - {0}  # none where no worker could answer
    if len(kinds) <= 1 and len(counts) <= 1:
        return []
    return ["> **These cards are not of the same text, seed and items:** measure all in one run."]


def _items(card: Card) -> int:
    return sum(task.items for task in card.quality.tasks.values()) if card.quality else 0


def _disturbed(rows: Sequence[Row]) -> list[str]:
    """Speed of a machine that others used at the same time says nothing about variants."""
    shares = [one.taken_by_others for row in rows if (one := row.card.machine) and one.taken_by_others is not None]
    if not shares or max(shares) < DISTURBED:
        return []
    span = f"{min(shares):.0%} to {max(shares):.0%}" if len(shares) > 1 else f"{shares[0]:.0%}"
    return [f"> **Speed and cost below are no comparison:** others took {span} of the cores while they were measured."]


def _advice(rows: Sequence[Row]) -> list[str]:
    offered = [row for row in rows if row.is_offered]
    if not offered:
        return ["No variant was served here, so that only their quality can be compared."]
    chosen = [
        ("One user at a time", _most(offered, lambda row: _rate(row, lone=True)), "most tokens/s for one stream"),
        ("Many users, lowest cost", _most(offered, lambda row: _rate(row, lone=False)), "most tokens/s in all"),
        ("Long prompts, quick first token", _most(offered, lambda row: -_ttft(row)), "shortest TTFT"),
        ("Least memory", _most(offered, lambda row: -(row.card.memory_bytes or 0)), "smallest worker"),
        ("Least disk", _most(offered, lambda row: -row.card.size_bytes), "smallest checkpoint"),
    ]
    lines = ["| You want | Run | Because | Relative quality |", "|---|---|---|---|"]
    lines += [f"| {wish} | `{row.variant}` | {reason} | {_estimate(row.card)} |" for wish, row, reason in chosen]
    return ["\n".join(lines), "Only variants that were served here and pass their quality gate are named above."]


def _most(rows: Sequence[Row], value: Callable[[Row], float]) -> Row:
    return max(rows, key=value)


def _rate(row: Row, *, lone: bool) -> float:
    speed = row.speed(lone=lone)
    return speed.tokens_per_s if speed else 0.0


def _ttft(row: Row) -> float:
    speed = row.speed(lone=True)
    return speed.ttft_p50_s if speed else float("inf")


def _estimate(card: Card) -> str:
    return str(card.quality.relative) if card.quality else NONE


def _streams(rows: Sequence[Row]) -> list[int]:
    return sorted({speed.streams for row in rows for speed in row.card.speed})


def _performance_head(rows: Sequence[Row]) -> list[str]:
    return [
        f"{figure}, {streams} stream{'s' if streams > 1 else ''}"
        for streams in _streams(rows)
        for figure in ("TTFT p50 ms", "ITL p50 ms", "tokens/s")
    ]


def _performance(row: Row, rows: Sequence[Row]) -> list[str]:
    by_streams = {speed.streams: speed for speed in row.card.speed}
    cells: list[str] = []
    for streams in _streams(rows):
        speed = by_streams.get(streams)
        cells += (
            [f"{speed.ttft_p50_s * 1000:,.0f}", f"{speed.itl_p50_s * 1000:,.0f}", f"{speed.tokens_per_s:,.1f}"]
            if speed
            else [NONE] * 3
        )
    card = row.card
    memory = f"{card.memory_bytes / MIB:,.0f}" if card.memory_bytes else NONE
    cost = f"{card.cost.per_million_tokens:.2f}" if card.cost else NONE
    return [*cells, memory, f"{card.size_bytes / MIB:,.0f}", cost]


def _quality(row: Row, _rows: Sequence[Row]) -> list[str]:
    quality = row.card.quality
    if quality is None:
        return ["not measured" if row.verdict.passed else str(row.verdict)] + [NONE] * (5 + len(TASKS))
    values: list[Estimate] = [
        quality.relative, quality.kl_nats_per_token, quality.js_nats_per_token, quality.top1_agreement,
        quality.perplexity_ratio,
    ]  # fmt: skip
    return [str(row.verdict), *map(str, values), *(_task(row.card, task) for task in TASKS)]


def _task(card: Card, task: TaskName) -> str:
    score = card.quality.tasks.get(task) if card.quality else None
    return str(score.score) if score else NONE


def _table(head: Sequence[str], rows: Sequence[Row], cells: Callable[[Row, Sequence[Row]], list[str]]) -> str:
    lines = [_line(head), _line(["---"] * len(head))]
    return "\n".join([*lines, *(_line([f"`{row.variant}`", *cells(row, rows)]) for row in rows)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _slower(rows: Sequence[Row]) -> list[str]:
    """What compression made worse, in words: a table hides it too well."""
    dense = rows[0].card
    found = []
    for row in rows[1:]:
        worse = {
            axis: value
            for axis, value in ratios(row.card, dense).items()
            if axis != "quality" and value is not None and value < NOTABLY
        }
        if worse:
            found.append(f"- `{row.variant}`: " + ", ".join(f"{axis} {value:.2f}×" for axis, value in worse.items()))
    return (
        [
            "Worse than the dense variant here (1× is equal, less is worse; first token and tokens/s with one stream):",
            "\n".join(found),
        ]
        if found
        else []
    )


def _sparse(rows: Sequence[Row]) -> list[str]:
    sparse = [(row, use) for row in rows if (use := row.card.sparse_use)]
    if not sparse:
        return []
    head = [_line(("variant", "activated parameters", "S-MBU", "S-MFU")), _line(["---"] * 4)]
    lines = [
        _line(
            (
                f"`{row.variant}`",
                f"{row.card.activated_parameters / 1e6:,.0f} M",
                f"{use.bandwidth:.3f}",
                f"{use.compute:.3f}",
            )
        )
        for row, use in sparse
    ]
    source = (
        "Sparsity-aware use of memory bandwidth and compute, as [MoE-CAP](https://arxiv.org/abs/2412.07067) defines it."
    )
    return ["## Mixtures of experts", "\n".join(head + lines), source]


def _cascade(rows: Sequence[Row]) -> list[str]:
    """Of each variant, the cheapest step that keeps at least 97 % of what the dense one solves, by entropy."""
    lines = []
    for row in rows:
        for one in row.card.uncertainty:
            if one.measure == "entropy" and (
                good := [step for step in one.table if step.expected_quality >= CASCADE_QUALITY]
            ):
                step = min(good, key=lambda step: step.escalated_share)
                lines.append(
                    _line(
                        (
                            f"`{row.variant}`", f"{step.threshold:.3g}", f"{step.escalated_share:.0%}",
                            f"{step.expected_quality:.2f}", f"{one.table[-1].expected_quality:.2f}",
                        )
                    )
                )  # fmt: skip
    if not lines:
        return []
    head = [_line(("small variant", "entropy above", "goes to dense", "solves, × dense", "alone")), _line(["---"] * 5)]
    said = (
        f"The least that must go to the dense variant for a cascade to solve {CASCADE_QUALITY:.0%} of what it solves."
    )
    return ["## Cascades", "\n".join(head + lines), said]


def _missing(rows: Sequence[Row]) -> list[str]:
    found = [f"- `{row.variant}`: {row.card.reason}" for row in rows if row.card.reason]
    return ["## What could not be measured", "\n".join(found)] if found else []


def _measured(rows: Sequence[Row]) -> str:
    """How, of what was measured at all."""
    card = rows[0].card
    lines = []
    if machine := card.machine:
        price = f", at ${card.cost.machine_price_per_hour:g} an hour" if card.cost else ""
        lines.append(
            f"- Machine: {machine.cores} cores ({machine.instruction_set}), vLLM {machine.engine_version} for"
            f" {machine.engine}{price}. One worker at a time, the client beside it."
        )
    if card.quality:
        asked = (
            f"{_items(card)} items of three tasks through the worker's own API by lm-evaluation-harness"
            if _items(card)
            else "no tasks, so that the text alone decides"
        )
        lines.append(
            f"- Quality: {card.quality.tokens:,} tokens of text (SHA-256 `{card.text_sha256[:12]}`), all logits;"
            f" {asked}; seed {card.seed}."
        )
    if card.speed:
        lines.append(
            "- Speed: prompts of about 80 tokens that share no beginning, 64 generated tokens, greedy, streamed."
            " Memory is the PSS of the worker's processes."
        )
    return "\n".join(lines)
