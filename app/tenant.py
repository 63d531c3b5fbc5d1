"""Who pays for a request, and what that allows: the noun that every package shares."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property

from app.preference import Policy


class Band(StrEnum):
    """Priority class, highest first."""

    PRIORITY = "priority"
    DEFAULT = "default"
    FLEX = "flex"
    BATCH = "batch"

    def within(self, ceiling: Band) -> Band:
        """This band, or the ceiling where this is higher."""
        return max(self, ceiling, key=_ORDER.__getitem__)


_ORDER = {band: rank for rank, band in enumerate(Band)}


@dataclass(frozen=True)
class Limits:
    """What a tenant may use, over all replicas; None is no limit. Minutes and days are windows that refill."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    input_tokens_per_min: int | None = None
    output_tokens_per_min: int | None = None
    tokens_per_day: int | None = None
    concurrent: int | None = None

    @cached_property
    def rates(self) -> tuple[tuple[str, int], ...]:
        """Those that refill and are set, (name, most). They are looked at for each request, so they are found once."""
        named = ((part.name, getattr(self, part.name)) for part in fields(self))
        return tuple((name, most) for name, most in named if most is not None and name != "concurrent")

    @property
    def is_unlimited(self) -> bool:
        return not self.rates and self.concurrent is None


UNLIMITED = Limits()


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays. Made once when the settings are read: two requests of one tenant share the object.

    `weight` is its share beside others', `ceiling` the highest band it gets. `models` are the public names it may ask
    for, None for all: a model's name allows every variant of it. `max_tokens` is the most that one request may ask for.
    `engine_fields`: fields that steer the engine itself are passed on. `resume` outranks what the model says about
    broken streams. `degrade` is its consent to be served by a lesser variant under pressure, `policy`
    what chooses among a model's variants where that is not as the model says. `cache_salt` keeps its
    part of a worker's prefix cache apart from others'; empty, it shares with everybody whose salt is empty.
    """

    name: str
    weight: float = 1.0
    ceiling: Band = Band.PRIORITY
    models: frozenset[str] | None = None
    limits: Limits = UNLIMITED
    max_tokens: int | None = None
    engine_fields: bool = False
    resume: bool | None = None
    degrade: bool = False
    policy: Policy | None = None
    cache_salt: str = ""

    def may_use(self, model: str, variant: str) -> bool:
        """Whether `variant` of `model` is among its models; both are names, the variant's without the model's."""
        return self.models is None or model in self.models or f"{model}:{variant}" in self.models

    @property
    def is_anonymous(self) -> bool:
        """Whether this is nobody in particular: then its requests are many people's."""
        return self.name == ANONYMOUS.name


ANONYMOUS = Tenant("anonymous")
"""Whose requests are those that nobody has put a name to."""
