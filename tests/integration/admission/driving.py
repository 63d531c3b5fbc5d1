"""Drives the real scripts on a real server, with a clock that the test moves."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import redis

from app.admission import ledger
from app.admission.fairness import Grant, Place, Rules
from app.admission.ledger import Answer, Call, Ledger, LedgerChanged, Scripts, SharedRules, Synced
from app.settings import Redis

CLOCK_KEY = "test-clock"
MOVED_CLOCK = f"local function now_us() return tonumber(redis.call('GET', '{CLOCK_KEY}')) end\n"
SCRIPTS = Scripts(MOVED_CLOCK)
LEASE_US = 15_000_000
SETTLE_US = 6_000_000
PATIENCE_S = 30.0
"""A machine that stands still for a while is not what these tests are about."""

RULES = Rules(
    tenant_limit=5,
    band_limit=9,
    total_limit=12,
    tenant_bytes=1000,
    band_bytes=2000,
    total_bytes=3000,
    ageing_us=2_000_000,
    us_per_token=0,
)


class Clock:
    """The time that scripts see, microseconds."""

    def __init__(self, client: redis.Redis, now_us: int = 1_800_000_000_000_000) -> None:
        self._client = client
        self.now_us = now_us
        self.move(0)

    def move(self, by_us: int) -> None:
        self.now_us += by_us
        self._client.set(CLOCK_KEY, self.now_us)


class Replica:
    """One gateway process as the ledger sees it: calls scripts, hears grants, remembers nothing."""

    def __init__(
        self, url: str, name: str, rules: Rules = RULES, replicas: int = 1, scripts: Scripts = SCRIPTS
    ) -> None:
        self.name = name
        shared = SharedRules(rules, lease_us=LEASE_US, settle_us=SETTLE_US, replicas=replicas)
        self.ledger = Ledger(Redis(url=url, call_timeout_s=PATIENCE_S), name, shared, scripts)

    async def __aenter__(self) -> Self:
        await self.ledger.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.ledger.close()

    def new_id(self) -> str:
        return f"{self.name}.{secrets.token_hex(16)}"

    async def call(self, call: Call) -> Answer:
        (outcome,) = await self.ledger.exchange([call])
        assert isinstance(outcome, Answer), outcome
        return outcome

    async def is_told_to_sync(self, call: Call) -> bool:
        (outcome,) = await self.ledger.exchange([call])
        return isinstance(outcome, LedgerChanged)

    async def sync(
        self,
        slots: dict[str, int],
        leases: Sequence[tuple[str, str]] = (),
        tickets: Sequence[str] = (),
        limits: dict[str, int] | None = None,
    ) -> tuple[Synced, list[Grant]]:
        given = sorted((limits or {}).items())
        answer = await self.call(ledger.sync(leases, tickets, sorted(slots.items()), secrets.token_hex(8), given))
        assert isinstance(answer.body, Synced)
        return answer.body, answer.grants

    async def arrive(self, *places: Place) -> Answer:
        return await self.call(ledger.arrive(places))
