"""How far a variant's own doubt tells its wrong answers from its right ones: the table a cascade is set by. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from app.card import Uncertainty, UncertaintyStep
from app.evaluation.resampling import shortened
from app.uncertainty import MEASURES, TOP_LOGPROBS, WINDOW_TOKENS, highest_mean

STEPS = 10
MEASURED: tuple[Literal["entropy", "margin"], ...] = ("entropy", "margin")


@dataclass(frozen=True, slots=True)
class Answered:
    """One item: the alternatives of each token of the answer (log-probabilities), and how it turned out."""

    alternatives: Sequence[Sequence[float]]
    right: bool
    dense_right: bool
    same: bool  # the dense sibling's answer, word for word


def calibrate(answers: Sequence[Answered]) -> tuple[Uncertainty, ...]:
    """A table for each measure. `answers` must not be empty."""
    return tuple(_calibrated(measure, answers) for measure in MEASURED)


def _calibrated(measure: Literal["entropy", "margin"], answers: Sequence[Answered]) -> Uncertainty:
    of_token = MEASURES[measure]
    doubts = [
        shortened(
            highest_mean(
                [of_token(sorted(token, reverse=True)[:TOP_LOGPROBS]) for token in answer.alternatives], WINDOW_TOKENS
            )
        )
        for answer in answers
    ]
    return Uncertainty(
        measure=measure,
        window_tokens=WINDOW_TOKENS,
        top_logprobs=TOP_LOGPROBS,
        items=len(answers),
        table=tuple(_step(threshold, doubts, answers) for threshold in _thresholds(doubts)),
    )


def _thresholds(doubts: Sequence[float]) -> list[float]:
    """0, where all that have any doubt escalate, to the greatest doubt, where none does: by equal shares of answers."""
    ordered = sorted(doubts)
    last = len(ordered) - 1
    return sorted({0.0, *(ordered[round(last * step / STEPS)] for step in range(STEPS + 1))})


def _step(threshold: float, doubts: Sequence[float], answers: Sequence[Answered]) -> UncertaintyStep:
    decided = [(answer, doubt > threshold) for doubt, answer in zip(doubts, answers, strict=True)]
    agreement = sum(escalated or answer.same for answer, escalated in decided) / len(answers)
    right = sum(answer.dense_right if escalated else answer.right for answer, escalated in decided)
    dense = sum(answer.dense_right for answer in answers)
    return UncertaintyStep(
        threshold=threshold,
        escalated_share=shortened(sum(escalated for _, escalated in decided) / len(answers)),
        # Where the dense sibling solves nothing, its words are all there is to go by.
        expected_quality=shortened(right / dense if dense else agreement),
        agreement=shortened(agreement),
    )
