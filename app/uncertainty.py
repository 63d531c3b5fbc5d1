"""How sure a model was of its answer, from the alternatives it weighed: what a cascade escalates by. Pure.

One number per answer, higher is less sure: the highest mean over `window` tokens in a row, so that a doubtful passage
counts wherever it stands. `sluice evaluate` calibrates it, the gateway compares it with a threshold of the card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from app.card import Uncertainty

WINDOW_TOKENS = 8
TOP_LOGPROBS = 5


def entropy(logprobs: Iterable[float]) -> float:
    """Nats of one token's alternatives; what they leave of probability 1 counts as one more alternative.

    Bounded by ln(k + 1) for k alternatives, and below the entropy of the whole vocabulary.
    """
    seen = [math.exp(min(0.0, logprob)) for logprob in logprobs]
    rest = max(0.0, 1.0 - sum(seen))
    return sum(-p * math.log(p) for p in (*seen, rest) if p > 0)


def margin(logprobs: Iterable[float]) -> float:
    """1 minus the lead in probability of the best over the second alternative; 0 is certain, 1 a tie."""
    first, second, *_ = [*sorted((math.exp(min(0.0, logprob)) for logprob in logprobs), reverse=True), 0.0, 0.0]
    return 1.0 - (first - second)


MEASURES: dict[str, Callable[[Iterable[float]], float]] = {"entropy": entropy, "margin": margin}


def highest_mean(values: Sequence[float], window: int) -> float:
    """The highest mean of `window` neighbours, of all values where there are fewer; 0 without any."""
    width = min(window, len(values))
    if not width:
        return 0.0
    sums = [0.0, *accumulate(values)]
    return max(sums[end] - sums[end - width] for end in range(width, len(sums))) / width


def of_answer(tokens: Iterable[Iterable[float]], calibrated: Uncertainty) -> float:
    """An answer's uncertainty as `calibrated` measures it; `tokens` are the log-probabilities of each's alternatives.

    Only the `top_logprobs` most probable of them count, so that a client who asked for more changes nothing.
    """
    measure = MEASURES[calibrated.measure]
    best = (sorted(token, reverse=True)[: calibrated.top_logprobs] for token in tokens)
    return highest_mean([measure(token) for token in best], calibrated.window_tokens)
