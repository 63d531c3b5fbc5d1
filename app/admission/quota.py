"""What tenants take of their limits, as a pure machine: the executable specification of `scripts/quota.lua`.

- A limit holds in every window: no `window_us` of time, wherever it begins, has more taken in it than `most`. A *meter*
  is what a tenant took of one limit. What is taken comes back a window later, up to a sixtieth of the window late and
  never early: a meter keeps sixtieths, not single takings.
- A request *reserves* on arrival: all of its claims, or none of them and is refused. It *settles* once, when it ends.
  What it did not need comes back at once, out of the sixtieth where it was reserved; what it used beyond is taken when
  that is known.
- As long as a reservation is not settled it is *live*; a tenant may have so many at once.

Times are integer microseconds of one clock and come in as arguments; amounts are requests or tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from app.tenant import Limits

SLICES = 60
MINUTE_US = 60_000_000
DAY_US = 24 * 60 * MINUTE_US
REQUESTS = "requests_per_min"
CONCURRENT = "concurrent"
DAILY = "tokens_per_day"
METERS_KNOWN = 10_000  # above so many, those that nothing is taken of are forgotten


class Tokens(NamedTuple):
    """Input and output tokens of one request."""

    input: int
    output: int


NOTHING = Tokens(0, 0)


class Claim(msgspec.Struct, array_like=True, frozen=True):
    """`amount` of a limit of `most` in each `window_us`. Only the amount is the request's own."""

    limit: str
    most: int
    window_us: int
    amount: int

    @property
    def is_too_large(self) -> bool:
        """Whether it can never be met, however long one waits."""
        return self.amount > self.most


class Demand(msgspec.Struct, array_like=True, frozen=True):
    """What a request reserves, all or nothing, under an id of its own; `concurrent` 0 is any number at once."""

    reservation: str
    concurrent: int
    claims: tuple[Claim, ...]

    def share(self, part_of: Callable[[int], int]) -> Demand:
        """The same demand of a part of each limit, where nobody knows what others take of the rest."""
        claims = tuple(msgspec.structs.replace(claim, most=part_of(claim.most)) for claim in self.claims)
        concurrent = self.concurrent and (part_of(self.concurrent) or NONE_AT_ONCE)
        return Demand(self.reservation, concurrent, claims)


NONE_AT_ONCE = -1
"""A share that is less than one request at once."""


class Settlement(msgspec.Struct, array_like=True, frozen=True):
    """The end of a tenant's reservation: what it claimed, and what was really used, in the order of its claims."""

    reservation: str
    tenant: str
    claims: tuple[Claim, ...]
    amounts: tuple[int, ...]


class Reading(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How a meter stands: what is taken, and how long until all of that has come back."""

    used: int
    reset_us: int


class Metered(NamedTuple):
    """A tenant and what it may claim, to be looked at; amounts say nothing here."""

    tenant: str
    claims: tuple[Claim, ...]


class Usage(msgspec.Struct, array_like=True, frozen=True):
    """How many of a tenant's reservations are live, and how its meters stand."""

    tenant: str
    live: int
    readings: list[Reading]


class Taking(NamedTuple):
    """An amount that a tenant took of a limit, `taken_us` at the latest."""

    tenant: str
    limit: str
    window_us: int
    taken_us: int
    amount: int


class Objection(NamedTuple):
    """A demand is not met: `is_live` because of those at once, else because of a window, until after the wait."""

    is_live: bool
    wait_us: int = 0


def claims_of(limits: Limits, known: Tokens, guessed: Tokens) -> tuple[Claim, ...]:
    """What a request claims of `limits`, before its usage is known.

    Output that a client states (`max_tokens`, for all of its choices) is `known` and claimed whole, as OpenAI does it:
    what is generated then never exceeds what was reserved. What is only guessed never makes a request too large: it
    counts up to what the limit leaves beside what is known.
    """
    return tuple(
        [
            Claim(limit, most, DAY_US if limit == DAILY else MINUTE_US, WEIGHS[limit].amount(known, guessed, most))
            for limit, most in limits.rates
        ]
    )


def amounts_of(claims: tuple[Claim, ...], known: Tokens, guessed: Tokens) -> tuple[int, ...]:
    """What each claim comes to in the end; what is not known even then stands as it was reserved."""
    return tuple([WEIGHS[claim.limit].amount(known, guessed, claim.amount) for claim in claims])


class Weighs(NamedTuple):
    """What a limit counts of a request."""

    requests: int = 0
    input: int = 0
    output: int = 0

    def amount(self, known: Tokens, guessed: Tokens, bound: int) -> int:
        """All that is known, and what is guessed up to the bound."""
        requests, inputs, outputs = self
        sure = requests + inputs * known.input + outputs * known.output
        likely = sure + inputs * guessed.input + outputs * guessed.output
        return likely if likely <= bound else max(sure, bound)


WEIGHS = {
    REQUESTS: Weighs(requests=1),
    "tokens_per_min": Weighs(input=1, output=1),
    "input_tokens_per_min": Weighs(input=1),
    "output_tokens_per_min": Weighs(output=1),
    DAILY: Weighs(input=1, output=1),
}


@dataclass(slots=True)
class Meter:
    """What was taken in the last window, by sixtieths: `sum` is all of it as of the sixtieth `at`.

    Time may go back between any two calls.
    """

    width_us: int
    slices: dict[int, int] = field(default_factory=dict)
    last: int = 0
    sum: int = 0
    at: int = 0

    def used(self, now_us: int) -> int:
        self._roll(now_us)
        return self.sum

    def reset_us(self, now_us: int) -> int:
        return self._returns_us(self.last, now_us) if self.used(now_us) else 0

    def wait_us(self, claim: Claim, now_us: int) -> int:
        """How long until the claim has room, if nothing else is taken."""
        excess = self.used(now_us) + claim.amount - claim.most
        for slice_ in sorted(self.slices):
            excess -= self.slices[slice_]
            if excess <= 0:
                return self._returns_us(slice_, now_us)
        return claim.window_us

    def take(self, amount: int, now_us: int) -> None:
        self._roll(now_us)
        if amount:
            self.last = now_us // self.width_us
            self.slices[self.last] = self.slices.get(self.last, 0) + amount
            self.sum += amount

    def give_back(self, amount: int, taken_us: int, now_us: int) -> None:
        """Undo part of what was taken then, as far as it is still counted."""
        self._roll(now_us)
        slice_ = taken_us // self.width_us
        if slice_ in self.slices:
            undone = min(amount, self.slices[slice_])
            self.sum -= undone
            self._put(slice_, self.slices[slice_] - undone)

    def _returns_us(self, slice_: int, now_us: int) -> int:
        return (slice_ + SLICES + 1) * self.width_us - now_us

    def _roll(self, now_us: int) -> None:
        """Forget what has left the window. What is dated later than now, by a clock set back, is of now."""
        current = now_us // self.width_us
        if current == self.at:
            return
        self.at, self.last = current, min(self.last, current)
        for slice_ in [*self.slices]:
            if slice_ < current - SLICES:
                del self.slices[slice_]
            elif slice_ > current:
                self.slices[current] = self.slices.get(current, 0) + self.slices.pop(slice_)
        self.sum = sum(self.slices.values())

    def _put(self, slice_: int, amount: int) -> None:
        if amount:
            self.slices[slice_] = amount
        else:
            del self.slices[slice_]


class _Reservation(NamedTuple):
    tenant: str
    taken_us: int
    claims: tuple[Claim, ...]


class Quota:
    """All meters and live reservations."""

    def __init__(self) -> None:
        self._meters: dict[tuple[str, str], Meter] = {}
        self._reserved: dict[str, _Reservation] = {}
        self._live: defaultdict[str, set[str]] = defaultdict(set)
        self._crowded = METERS_KNOWN

    def live(self, tenant: str) -> int:
        return len(self._live[tenant]) if tenant in self._live else 0

    def names(self) -> set[str]:
        """All live reservations."""
        return set(self._reserved)

    def objection(self, tenant: str, demand: Demand, now_us: int) -> Objection | None:
        """What speaks against `demand`, if anything. One that is reserved already has been met."""
        if demand.reservation in self._reserved:
            return None
        meters = [(self._meter(tenant, claim, now_us), claim) for claim in demand.claims]
        waits = [m.wait_us(claim, now_us) for m, claim in meters if m.used(now_us) + claim.amount > claim.most]
        if waits:
            return Objection(is_live=False, wait_us=max(waits))
        if demand.concurrent and self.live(tenant) >= demand.concurrent:
            return Objection(is_live=True)
        return None

    def reserve(self, tenant: str, demand: Demand, now_us: int) -> None:
        """Take all claims. The same reservation twice is one."""
        if demand.reservation not in self._reserved:
            self.hold(tenant, demand, now_us)
            for claim in demand.claims:
                self._meter(tenant, claim, now_us).take(claim.amount, now_us)

    def hold(self, tenant: str, demand: Demand, now_us: int) -> None:
        """Note a reservation whose claims are taken."""
        self._reserved[demand.reservation] = _Reservation(tenant, now_us, demand.claims)
        self._live[tenant].add(demand.reservation)

    def settle(self, settlement: Settlement, now_us: int) -> None:
        """End a reservation. One that is not known changes nothing; one that was made elsewhere has no claims here."""
        reserved = self._reserved.pop(settlement.reservation, None)
        if reserved is None:
            return
        self._live[reserved.tenant].discard(settlement.reservation)
        if not self._live[reserved.tenant]:
            del self._live[reserved.tenant]
        for claim, amount in zip(reserved.claims, settlement.amounts, strict=False):
            meter = self._meter(reserved.tenant, claim, now_us)
            if amount < claim.amount:
                meter.give_back(claim.amount - amount, reserved.taken_us, now_us)
            else:
                meter.take(amount - claim.amount, now_us)

    def takings_of_ended(self, now_us: int) -> list[Taking]:
        """All that is taken now, after every live reservation has given back what it took."""
        for name, made in [*self._reserved.items()]:
            self.settle(Settlement(name, made.tenant, made.claims, (0,) * len(made.claims)), now_us)
        return [
            Taking(tenant, limit, meter.width_us * SLICES, min(now_us, (slice_ + 1) * meter.width_us - 1), amount)
            for (limit, tenant), meter in self._meters.items()
            if meter.used(now_us)
            for slice_, amount in meter.slices.items()
        ]

    def usage(self, metered: Metered, now_us: int) -> Usage:
        tenant, claims = metered
        return Usage(tenant, self.live(tenant), self.readings(tenant, claims, now_us))

    def readings(self, tenant: str, claims: tuple[Claim, ...], now_us: int) -> list[Reading]:
        """How each claim's meter stands."""
        meters = [self._meter(tenant, claim, now_us) for claim in claims]
        return [Reading(meter.used(now_us), meter.reset_us(now_us)) for meter in meters]

    def _meter(self, tenant: str, claim: Claim, now_us: int) -> Meter:
        found = self._meters.get((claim.limit, tenant))
        if found is None:
            if len(self._meters) >= self._crowded:
                self._meters = {name: meter for name, meter in self._meters.items() if meter.used(now_us)}
                self._crowded = max(METERS_KNOWN, 2 * len(self._meters))
            found = self._meters[claim.limit, tenant] = Meter(claim.window_us // SLICES)
        return found
