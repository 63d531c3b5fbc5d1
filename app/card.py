"""The card of a variant: what it costs, how good it is, how fast it is, as `sluice evaluate` measured it.

Cost, accuracy and performance side by side are the idea of MoE-CAP (https://arxiv.org/abs/2412.07067). A card is part
of the manifest; `gate` decides from it, and from the configuration's thresholds, whether a variant may take traffic
that did not ask for it by name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.settings import QualityGate

TaskName = Literal["knowledge", "retrieval", "arithmetic"]


class CardPart(BaseModel):
    """Part of a card: immutable, and strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(CardPart):
    """A mean with its 95 % interval by resampling the texts or items that it is the mean of (bootstrap, percentile)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g}–{self.high:.3g})"


class TaskScore(CardPart):
    """The share of a task's items that were answered right, here and by the dense sibling."""

    score: Estimate
    stderr: float = Field(ge=0)
    dense: float = Field(ge=0, le=1)
    items: int = Field(ge=1)


class Quality(CardPart):
    """Against the dense sibling, on the same text and the same items.

    `relative` is 1 for the sibling itself: the mean of exp(-KL) and of the share that is kept of each task's score, or
    exp(-KL) alone where no task was run or the sibling solves none:

        relative = (exp(-kl_nats_per_token) + mean over tasks of min(1, score / dense)) / 2

    exp(-KL) is the factor by which the variant's probability of a token that the dense sibling would say falls short,
    in the geometric mean. All divergences are means over the tokens of the text, from all logits.
    """

    relative: Estimate
    kl_nats_per_token: Estimate = Field(description="Kullback-Leibler divergence of the variant from the dense sibling")
    js_nats_per_token: Estimate = Field(description="Jensen-Shannon divergence, at most ln 2")
    top1_agreement: Estimate = Field(description="share of tokens whose most probable continuation is the same")
    perplexity_ratio: Estimate = Field(description="of the variant by the dense sibling's, on the text as it stands")
    tokens: int = Field(ge=1, description="predicted tokens of the text")
    tasks: dict[TaskName, TaskScore] = Field(default_factory=dict)


class Speed(CardPart):
    """What one worker did under `streams` streams at a time; medians over the requests."""

    streams: int = Field(ge=1)
    ttft_p50_s: float = Field(ge=0)
    itl_p50_s: float = Field(ge=0)
    tokens_per_s: float = Field(ge=0, description="generated, by all streams together")


class Cost(CardPart):
    """Of generated tokens, at the throughput of the most streams measured."""

    per_million_tokens: float = Field(ge=0)
    machine_price_per_hour: float = Field(ge=0, description="what the machine costs; given, never measured")
    currency: str = "USD"
    streams: int = Field(ge=1)


class SparseUse(CardPart):
    """Use of the machine by a mixture of experts, counting only the experts that a token activates.

    S-MBU = (bytes of activated weights + bytes of its KV cache) / TPOT / peak bandwidth
    S-MFU = tokens/s x 2 FLOPs per activated parameter / peak FLOP/s
    Source: MoE-CAP, https://arxiv.org/abs/2412.07067, section on sparsity-aware metrics.
    """

    bandwidth: float = Field(ge=0, description="S-MBU at one stream")
    compute: float = Field(ge=0, description="S-MFU at the most streams measured")


class MeasuredOn(CardPart):
    """The machine of the measurement, without its name. Peaks are measured too: a copy, and a matrix product."""

    cores: int = Field(ge=1)
    instruction_set: str = Field(description="the widest that inference uses: amx, avx512-vnni, avx2, neon, cuda, …")
    engine: str
    engine_version: str
    peak_bytes_per_s: float | None = Field(None, gt=0)
    peak_flops: float | None = Field(None, gt=0, description="float32, per second")
    taken_by_others: float | None = Field(
        None, ge=0, le=1, description="share of the cores' time that other processes took while speed was measured"
    )


class UncertaintyStep(CardPart):
    """What happens when answers above `threshold` go to the dense sibling, and the others stay."""

    threshold: float = Field(ge=0, description="escalate where the answer's uncertainty is above; nats for entropy")
    escalated_share: float = Field(ge=0, le=1)
    expected_quality: float = Field(
        ge=0, description="right answers, as a share of the dense sibling's: the cascade's quality, 1 is dense alone"
    )
    agreement: float = Field(ge=0, le=1, description="share of answers that are then the dense sibling's own")


class Uncertainty(CardPart):
    """How well this variant knows when it is wrong; `table` by rising threshold. See `app.uncertainty`."""

    measure: Literal["entropy", "margin"]
    window_tokens: int = Field(ge=1, description="the measure is the highest mean over so many tokens in a row")
    top_logprobs: int = Field(ge=2, description="alternatives per token that the measure is taken from")
    items: int = Field(ge=1, description="answers that the table rests on")
    table: tuple[UncertaintyStep, ...] = Field(min_length=1)


class GateFailure(CardPart):
    """A threshold that a card misses."""

    threshold: str
    limit: float
    value: float

    def __str__(self) -> str:
        return f"{self.threshold} {self.limit:g}, measured {self.value:.3g}"


class Verdict(CardPart):
    """Whether a variant may take traffic that did not ask for it by name, and what it fails otherwise."""

    passed: bool
    failed: tuple[GateFailure, ...] = ()

    def __str__(self) -> str:
        return "passed" if self.passed else "; ".join(map(str, self.failed))


class PublicCard(CardPart):
    """Cost, accuracy and performance of one variant, as anybody may see them. What could not be measured is None."""

    quality: Quality | None = None
    speed: tuple[Speed, ...] = Field((), description="by rising number of streams")
    memory_bytes: int | None = Field(None, ge=0, description="of the worker's processes: PSS, so nothing counts twice")
    size_bytes: int = Field(ge=0, description="of the weights on disk")
    cost: Cost | None = None
    activated_parameters: int = Field(ge=0, description="that a token passes; all of them unless experts are chosen")
    sparse_use: SparseUse | None = None
    gate: Verdict | None = Field(None, description="by the thresholds of the measurement; the gateway judges anew")


class Card(PublicCard):
    """All of a card, as it stands in the manifest. `reason` may quote the engine, and with it names of this machine."""

    uncertainty: tuple[Uncertainty, ...] = Field((), description="one per measure; empty for the dense sibling")
    machine: MeasuredOn | None = None
    seed: int
    text_sha256: str
    reason: str | None = Field(None, description="why parts are missing, such as the engine's refusal to load it")

    @property
    def relative_quality(self) -> float | None:
        return self.quality.relative.value if self.quality else None

    @property
    def public(self) -> PublicCard:
        return PublicCard.model_construct(**{name: getattr(self, name) for name in PublicCard.model_fields})


def gate(card: Card | None, thresholds: QualityGate) -> Verdict:
    """Whether what was measured meets `thresholds`. Pure.

    A variant without a card, or whose quality was not measured, passes unless the thresholds say `require_card`.
    """
    quality = card.quality if card else None
    if quality is None:
        failures = [GateFailure(threshold="require_card", limit=1, value=0)] if thresholds.require_card else []
    else:
        failures = [*_text_failures(quality, thresholds), *_task_failures(quality, thresholds)]
    return Verdict(passed=not failures, failed=tuple(failures))


def _text_failures(quality: Quality, thresholds: QualityGate) -> list[GateFailure]:
    least = (
        ("min_quality", thresholds.min_quality, quality.relative.value),
        ("min_top1", thresholds.min_top1, quality.top1_agreement.value),
    )
    most = (
        ("max_kl", thresholds.max_kl, quality.kl_nats_per_token.value),
        ("max_perplexity_ratio", thresholds.max_perplexity_ratio, quality.perplexity_ratio.value),
    )
    low = [_failure(name, limit, value) for name, limit, value in least if limit is not None and not value >= limit]
    high = [_failure(name, limit, value) for name, limit, value in most if limit is not None and not value <= limit]
    return low + high


def _task_failures(quality: Quality, thresholds: QualityGate) -> list[GateFailure]:
    """A task that the dense sibling itself does not solve says nothing about what was lost."""
    limit = thresholds.min_task_share
    kept = {name: task.score.value / task.dense for name, task in quality.tasks.items() if task.dense > 0}
    return [
        _failure(f"min_task_share ({name})", limit, share)
        for name, share in kept.items()
        if limit is not None and share < limit
    ]


def _failure(threshold: str, limit: float, value: float) -> GateFailure:
    return GateFailure(threshold=threshold, limit=limit, value=value)
