"""From what was measured per text and per item to the quality of a card (`app.card.Quality` has the formulas). Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.card import Quality, TaskName, TaskScore
from app.evaluation.resampling import bootstrap, shortened


@dataclass(frozen=True, slots=True)
class TextSums:
    """Sums over the predicted tokens of one text, in nats where they are information.

    `nll` is the negative log-likelihood of the text as it stands, by the variant and by its dense sibling.
    """

    tokens: int
    kl: float
    js: float
    agreeing: int
    nll: float
    dense_nll: float


@dataclass(frozen=True, slots=True)
class Graded:
    """One item of a task, as answered by the variant and by its dense sibling."""

    right: bool
    dense_right: bool


Texts = Sequence[TextSums]
Items = Sequence[Graded]


def of_the_dense(texts: Texts) -> list[TextSums]:
    """The dense sibling, measured against itself."""
    return [TextSums(text.tokens, 0.0, 0.0, text.tokens, text.dense_nll, text.dense_nll) for text in texts]


def quality(texts: Texts, tasks: Mapping[TaskName, Items], seed: int) -> Quality:
    """What a card says. `texts` must not be empty, nor any of the `tasks`."""
    return Quality(
        relative=bootstrap([texts, *tasks.values()], lambda drawn: relative(drawn[0], drawn[1:]), seed),  # type: ignore[arg-type]
        kl_nats_per_token=bootstrap([texts], lambda drawn: kl(drawn[0]), seed),
        js_nats_per_token=bootstrap([texts], lambda drawn: _per_token(drawn[0], "js"), seed),
        top1_agreement=bootstrap([texts], lambda drawn: _per_token(drawn[0], "agreeing"), seed),
        perplexity_ratio=bootstrap([texts], lambda drawn: perplexity_ratio(drawn[0]), seed),
        tokens=sum(text.tokens for text in texts),
        tasks={name: task_score(items, seed) for name, items in tasks.items()},
    )


def relative(texts: Texts, tasks: Sequence[Items]) -> float:
    """Relative quality: 1 for the dense sibling itself."""
    fidelity = math.exp(-kl(texts))
    kept = [share for items in tasks if (share := kept_share(items)) is not None]
    return (fidelity + sum(kept) / len(kept)) / 2 if kept else fidelity


def kept_share(items: Items) -> float | None:
    """How much of the dense sibling's score is left, at most all of it; None where the sibling solves nothing."""
    dense = sum(item.dense_right for item in items)
    return min(1.0, sum(item.right for item in items) / dense) if dense else None


def kl(texts: Texts) -> float:
    return _per_token(texts, "kl")


def perplexity_ratio(texts: Texts) -> float:
    return math.exp(_per_token(texts, "nll") - _per_token(texts, "dense_nll"))


def task_score(items: Items, seed: int) -> TaskScore:
    """The share of right answers; its standard error as of a binomial."""
    score = bootstrap([items], lambda drawn: share_right(drawn[0]), seed)
    return TaskScore(
        score=score,
        stderr=shortened(math.sqrt(score.value * (1 - score.value) / len(items))),
        dense=shortened(sum(item.dense_right for item in items) / len(items)),
        items=len(items),
    )


def share_right(items: Items) -> float:
    return sum(item.right for item in items) / len(items)


def _per_token(texts: Texts, field: str) -> float:
    return float(sum(getattr(text, field) for text in texts) / sum(text.tokens for text in texts))
