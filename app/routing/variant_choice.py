"""Which of a model's variants may serve a request, in which order, and why. Pure: no clock, no I/O.

Policies put a model's variants on a ladder, best first as the policy sees it; equals share a rung. A request is meant
for the highest rung that has a worker. A tenant that consents to `degrade` is taken further down rather than let wait
longer than the TTFT target: rung after rung is opened to its request, the higher ones stay open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import groupby
from math import inf
from typing import Any, Protocol

import msgspec

from app.catalogue import Cascade, Model, Offer, Variant
from app.errors import InvalidValue, ModelNotFound
from app.preference import Policy, Preference
from app.settings import Choosing
from app.tenant import Tenant

CALM_MAX = 16
"""Times `calm_s`: the longest that a ladder under lasting pressure waits before it tries to step up again."""

Rung = tuple[Variant, ...]


class Reason(StrEnum):
    """Why a variant served; a label of metrics and a header."""

    ONLY = "only"
    PINNED = "pinned"
    QUALITY = "quality"
    ECONOMY = "economy"
    BALANCED = "balanced"
    ANY = "any"
    TTFT = "ttft"
    """A better variant would not have kept the TTFT that was asked for."""
    UNAVAILABLE = "unavailable"
    """What the policy prefers has no worker now."""
    CANARY = "canary"
    PRESSURE = "pressure"
    """Too many wait for what the policy prefers."""
    SURE = "sure"
    """A cascade's small variant was sure of its answer."""
    UNSURE = "unsure"
    """A cascade's large variant answered, since the small one was not sure."""
    KEPT = "kept"
    """A cascade's small variant was not sure of its answer, and the large one could not be had."""
    FALLBACK = "fallback"
    """The model that was asked for has no worker now; this is another one."""


class Terms(msgspec.Struct, frozen=True):
    """What holds for one request: its own preference, else its tenant's terms, else the model's.

    `wait_s` is how long it waits for one rung before the next is opened, inf without consent. `ttft_s` is None if it
    asked for none. `point` is its place in 0..1 that says on which side of a canary it is.
    """

    policy: Policy
    cost_weight: float
    quality_floor: float
    ttft_s: float | None
    wait_s: float
    point: float

    @classmethod
    def of(cls, model: Choosing, tenant: Tenant, asked: Preference, point: float = 1.0) -> Terms:
        """Raises InvalidValue for a cascade where there is none."""
        consents = tenant.degrade and asked.degrade is not False
        policy = asked.policy or tenant.policy or Policy(model.policy)
        if policy is Policy.CASCADE and model.cascade is None:
            if asked.policy is not None:
                raise InvalidValue("This model has no cascade.", param="sluice.policy")
            policy = Policy(model.policy)
        return cls(
            policy,
            model.cost_weight if asked.cost_weight is None else asked.cost_weight,
            max(model.quality_floor, asked.quality_floor or 0.0),
            asked.ttft_s,
            min(model.ttft_target_s, asked.ttft_s or inf) if consents else inf,
            point,
        )


class Outlook(Protocol):
    """What is known of the variants' workers now."""

    def serves(self, variant: Variant) -> bool:
        """Whether any worker of it does, or will without having to prove itself again."""

    def ttft_s(self, variant: Variant) -> float:
        """Expected from dispatch to the first token; 0 if nothing is known."""

    def level(self, model: Model, ladder: Sequence[Rung]) -> int:
        """How many rungs pressure has opened already below the first of `ladder`."""


class Step(msgspec.Struct, frozen=True):
    """Rungs that are open to a request, best first, and how long it waits for a slot there before its next step."""

    rungs: tuple[Rung, ...]
    wait_s: float = inf


class Choice(msgspec.Struct, frozen=True):
    """What may serve a request, step after step, each open to all that the one before was. `reason` is the first's.

    `is_decided` where there was more than one variant to choose from. `headers` are what the answer has to say of it.
    In a `cascade` the only step is the small variant's.
    """

    model: Model
    steps: tuple[Step, ...]
    reason: Reason
    is_decided: bool = False
    headers: tuple[tuple[bytes, bytes], ...] = ()
    cascade: Cascade | None = None

    @property
    def meant(self) -> Rung:
        """The rung that the request is meant for."""
        return self.steps[0].rungs[0]

    def reason_for(self, variant: Variant) -> Reason:
        """Why `variant` serves. By its name: a reload may have made it anew since."""
        if any(meant.name == variant.name for meant in self.meant):
            return self.reason
        return Reason.UNSURE if self.cascade is not None else Reason.PRESSURE


def choose(offer: Offer, terms: Callable[[], Terms], outlook: Outlook) -> Choice:
    """The choice for one request; `terms` are asked for only where there is something to choose.

    Raises InvalidValue if no variant is above the floor, and ModelNotFound if none passes the quality gate.
    """
    if len(offer.variants) == 1:
        reason = Reason.PINNED if offer.is_pinned else Reason.ONLY
        return Choice(offer.model, (Step((offer.variants,)),), reason, headers=offer.headers)
    if not offer.variants:
        raise ModelNotFound("No variant of this model passes its quality gate; name the one you want.", param="model")
    return _choose(offer, terms(), outlook)


def point_of(*parts: str) -> float:
    """A place in 0..1 for what these parts name together: the same on every gateway, evenly spread."""
    key = "\n".join(parts).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()) / 2**56


def _choose(offer: Offer, terms: Terms, outlook: Outlook) -> Choice:
    able = tuple([variant for variant in offer.variants if variant.facts.quality >= terms.quality_floor])
    if not able:
        raise InvalidValue(
            f"No variant of this model has a quality of {terms.quality_floor:g} or more.", param="sluice.quality_floor"
        )
    cascade = offer.model.cascade
    if terms.policy is Policy.CASCADE and cascade is not None and _can_cascade(cascade, able, outlook):
        steps: tuple[Step, ...] = (Step(((cascade.small,),)),)
        return Choice(offer.model, steps, Reason.SURE, is_decided=True, headers=offer.headers, cascade=cascade)
    canary = offer.model.choosing.canary
    tried = None
    if canary is not None and terms.policy is not Policy.PINNED:
        tried = next((variant for variant in able if variant.name == canary.variant), None)
        able = tuple([variant for variant in able if variant is not tried]) or able
        if tried is not None and (terms.point * 100 >= canary.percent or not outlook.serves(tried)):
            tried = None
    ladder, reason = _ladder(able, terms, outlook)
    if tried is not None:
        ladder, reason = ((tried,), *(rung for rung in ladder if tried not in rung)), Reason.CANARY
    if terms.wait_s == inf or len(ladder) == 1:
        steps = (Step((ladder[0],)),)
    else:
        steps = _steps(ladder, terms.wait_s, outlook.level(offer.model, ladder))
    return Choice(offer.model, steps, reason, is_decided=True, headers=offer.headers)


def _can_cascade(cascade: Cascade, able: Rung, outlook: Outlook) -> bool:
    return all(one in able and outlook.serves(one) for one in (cascade.small, cascade.large))


def _steps(ladder: Sequence[Rung], wait_s: float, level: int) -> tuple[Step, ...]:
    last = len(ladder) - 1
    level = min(level, last)
    return tuple(
        [Step(tuple(ladder[: at + 1]), wait_s if at < last else inf) for at in range(level, last + 1)],
    )


def _ladder(variants: Rung, terms: Terms, outlook: Outlook) -> tuple[Sequence[Rung], Reason]:
    """The variants' rungs, from the one that the request is meant for downwards, and why it is meant for that one."""
    key = _KEYS[terms.policy]
    ranked = sorted(enumerate(variants), key=lambda item: key(item, terms), reverse=True)
    rungs = [
        tuple([variant for _, variant in group]) for _, group in groupby(ranked, key=lambda item: key(item, terms))
    ]
    serving = [rung for rung in rungs if any(map(outlook.serves, rung))] or rungs
    policy = Policy.QUALITY if terms.policy is Policy.CASCADE else terms.policy
    reason = Reason(policy) if serving[0] is rungs[0] else Reason.UNAVAILABLE
    if terms.policy is Policy.QUALITY and terms.ttft_s is not None:
        first = _in_time(serving, terms.ttft_s, outlook)
        if first:
            return serving[first:], Reason.TTFT
    return serving, reason


def _in_time(rungs: Sequence[Rung], ttft_s: float, outlook: Outlook) -> int:
    """The first rung that is expected to begin within `ttft_s`, the quickest if none is."""
    expected = [min(map(outlook.ttft_s, rung)) for rung in rungs]
    return next((at for at, wait_s in enumerate(expected) if wait_s <= ttft_s), expected.index(min(expected)))


# Rounded, so that what differs by the order of a sum only is equal.
_KEYS: dict[Policy, Callable[[tuple[int, Variant], Terms], Any]] = {
    Policy.QUALITY: lambda item, terms: item[1].facts.quality,
    Policy.CASCADE: lambda item, terms: item[1].facts.quality,
    Policy.ECONOMY: lambda item, terms: (-item[1].facts.cost, item[1].facts.quality),
    Policy.BALANCED: lambda item, terms: round(item[1].facts.quality - terms.cost_weight * item[1].facts.cost, 9),
    Policy.ANY: lambda item, terms: 0,
    Policy.PINNED: lambda item, terms: -item[0],
}


class Ladder(msgspec.Struct, frozen=True):
    """How many rungs are open from the start below the one that requests are meant for. Times are monotonic seconds.

    It opens one as soon as a request found no slot in time on all that are open, and closes one after `calm_s` without
    pressure. If pressure is back soon after, it was closed too early: the next time that takes twice as long, and at
    most CALM_MAX times.
    """

    level: int = 0
    patience: int = 1
    changed: float = -inf
    """When it stepped."""
    closed: float = -inf
    """When it last stepped up."""

    def pressed(self, level: int, now: float, calm_s: float) -> Ladder:
        """A request found no slot in time with `level` rungs open, and there is one more."""
        if level < self.level:
            return self  # it is known: this one came before the step
        is_relapse = now - self.closed < calm_s * self.patience
        patience = min(CALM_MAX, self.patience * 2) if is_relapse else self.patience
        return Ladder(level + 1, patience, now, -inf if is_relapse else self.closed)

    def at(self, now: float, calm_s: float) -> Ladder:
        """The ladder at `now`: itself, or one step further up."""
        if not self.level or now - self.changed < calm_s * self.patience:
            is_forgotten = not self.level and self.patience > 1 and now - self.changed >= 2 * calm_s * CALM_MAX
            return Ladder() if is_forgotten else self
        return Ladder(self.level - 1, self.patience, now, now)
