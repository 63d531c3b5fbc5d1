"""Queries of death: requests that were in flight on workers when these died. Pure: times are monotonic seconds."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from msgspec import Raw

MOST_REMEMBERED = 4096
DEATHS_UNTIL_QUARANTINE = 2
QUARANTINED_UNTIL_CONFINED = 3


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One request, whoever sends it again: the tenant and a hash of the body."""

    tenant: str
    digest: bytes

    @classmethod
    def of(cls, tenant: str, fields: Mapping[str, Raw]) -> Fingerprint:
        """Of a body's top-level fields, each as the client's own bytes."""
        digest = blake2b(digest_size=16)
        for name, value in fields.items():
            digest.update(repr(name).encode())
            digest.update(value)
        return cls(tenant, digest.digest())


@dataclass(frozen=True, slots=True)
class Death:
    """One death of one worker, however many requests it held."""

    worker_id: str
    number: int


@dataclass(slots=True)
class _Record:
    """`deaths` holds at most as many as it takes to be quarantined."""

    deaths: set[Death] = field(default_factory=set)
    until: float = 0.0

    @property
    def is_quarantined(self) -> bool:
        return len(self.deaths) >= DEATHS_UNTIL_QUARANTINE


class Quarantine:
    """Remembers, for `period_s`, what workers died of: at most MOST_REMEMBERED requests, the latest ones.

    A request that two workers died with is quarantined. A tenant with three quarantined requests is confined: all that
    it sends goes to one worker, so that what it kills next is always the same. Workers take what travels with a killer
    down too, so innocent requests may be quarantined with it; nothing else keeps a third worker alive.
    """

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._records: OrderedDict[Fingerprint, _Record] = OrderedDict()
        self._quarantined = Counter[str]()

    def __bool__(self) -> bool:
        """Whether anything is on record: what asks first pays nothing while nothing ever died."""
        return bool(self._records)

    def blame(self, fingerprint: Fingerprint, death: Death, now: float) -> None:
        """A worker died while it held this request."""
        self._forget(now)
        record = self._records.setdefault(fingerprint, _Record())
        if not record.is_quarantined:
            record.deaths.add(death)
            self._quarantined[fingerprint.tenant] += record.is_quarantined
        record.until = now + self._period_s
        self._records.move_to_end(fingerprint)
        if len(self._records) > MOST_REMEMBERED:
            self._drop_oldest()

    def holds(self, fingerprint: Fingerprint, now: float) -> bool:
        """Whether this request must not be given to any worker."""
        self._forget(now)
        record = self._records.get(fingerprint)
        return record is not None and record.is_quarantined

    def confines(self, tenant: str, now: float) -> bool:
        """Whether all requests of `tenant` must go to one worker."""
        self._forget(now)
        return self._quarantined[tenant] >= QUARANTINED_UNTIL_CONFINED

    def _forget(self, now: float) -> None:
        """Drop what is past its time. All records live equally long, so the oldest blame is the first to go."""
        while self._records and next(iter(self._records.values())).until <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        fingerprint, record = self._records.popitem(last=False)
        if record.is_quarantined:
            self._quarantined -= Counter({fingerprint.tenant: 1})  # drops the tenant with its last one


def cell_of(tenant: str, worker_ids: tuple[str, ...]) -> str:
    """The one worker of these that a confined tenant gets: the same on every gateway, whatever their order.

    Rendezvous hashing: it changes only when that worker leaves the pool.
    """
    return max(worker_ids, key=lambda worker_id: blake2b(f"{tenant}\0{worker_id}".encode(), digest_size=8).digest())
