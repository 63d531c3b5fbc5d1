"""Cards as `sluice evaluate` writes them, with what a test cares about set."""

from __future__ import annotations

from app.card import Card, Estimate, Quality, TaskName, TaskScore


def exactly(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value)


def quality(
    relative: float = 0.9,
    *,
    kl: float = 0.05,
    top1: float = 0.9,
    tasks: dict[TaskName, tuple[float, float]] | None = None,
) -> Quality:
    """`tasks` holds each one's score and the dense sibling's."""
    return Quality(
        relative=exactly(relative),
        kl_nats_per_token=exactly(kl),
        js_nats_per_token=exactly(kl / 4),
        top1_agreement=exactly(top1),
        perplexity_ratio=exactly(1.1),
        tokens=1000,
        tasks={
            name: TaskScore(score=exactly(score), stderr=0.01, dense=dense, items=50)
            for name, (score, dense) in (tasks or {}).items()
        },
    )


def card(of: Quality | None = None, **parts: object) -> Card:
    return Card.model_validate(
        {"size_bytes": 1000, "activated_parameters": 500, "seed": 1, "text_sha256": "0" * 64, "quality": of, **parts}
    )
