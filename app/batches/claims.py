"""Who works on what: claims are leases, so that what a dead gateway worked on is another's soon.

Claims save work, they do not keep records right: that the storage does, by itself. So a claim may be lost with Redis,
and found again, and two gateways may for a while believe that they have it: some lines are then computed twice.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from redis.exceptions import RedisError

from app import settings
from app.errors import DependencyUnavailable
from app.redis_server import RedisServer

SUBJECTS_PER_CALL = 512
RENEWAL_MAX_S = 1.0
CONNECTIONS = 8
OPENING = "-opening-"

# A server that has lost its memory gives no claims until all holders have had the time to tell what they hold.
# KEYS[1]: when that is; ARGV[1]: holder, ARGV[2]: lease, ARGV[3]: settling, both in ms.
_SETTLED = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local opens = tonumber(redis.call('GET', KEYS[1]))
if not opens then
  opens = now + tonumber(ARGV[3])
  redis.call('SET', KEYS[1], opens)
end
"""
# The other keys: claims; ARGV[4]: how many to take. The keys that were taken.
_TAKE = (
    _SETTLED
    + """
local taken = {}
if now < opens then return taken end
for index = 2, #KEYS do
  local key = KEYS[index]
  if #taken >= tonumber(ARGV[4]) then break end
  if redis.call('SET', key, ARGV[1], 'NX', 'PX', ARGV[2]) then taken[#taken + 1] = key end
end
return taken
"""
)
# The other keys: claims. Those that are another's now; what nobody has is taken again.
_RENEW = (
    _SETTLED
    + """
local lost = {}
for index = 2, #KEYS do
  local key = KEYS[index]
  local holder = redis.call('GET', key)
  if holder == false or holder == ARGV[1] then
    redis.call('SET', key, ARGV[1], 'PX', ARGV[2])
  else
    lost[#lost + 1] = key
  end
end
return lost
"""
)
_RELEASE = """
for index = 2, #KEYS do
  if redis.call('GET', KEYS[index]) == ARGV[1] then redis.call('DEL', KEYS[index]) end
end
return 0
"""


def renewal_s(lease_s: float) -> float:
    """How often claims are renewed."""
    return min(RENEWAL_MAX_S, lease_s / 3)


class Claims(Protocol):
    """Claims of one gateway process. A subject is a word."""

    async def check(self) -> None:
        """Raises DependencyUnavailable if nothing could be claimed now."""

    async def take(self, subjects: Sequence[str], count: int = 1) -> list[str]:
        """Claim the first `count` of them that nobody has; empty as well when it is not known."""

    def holds(self, subject: str) -> bool:
        """Whether it is surely still claimed here."""

    async def renew(self) -> None:
        """Keep all that is held. What was lost is not held any more; without an answer all stays as it is."""

    async def release(self, subjects: Sequence[str]) -> None:
        """Let go."""

    async def close(self) -> None:
        """Let go of everything."""


class LocalClaims:
    """Where one process is alone."""

    def __init__(self) -> None:
        self._held: set[str] = set()

    async def check(self) -> None:
        return

    async def take(self, subjects: Sequence[str], count: int = 1) -> list[str]:
        taken = [subject for subject in subjects if subject not in self._held][:count]
        self._held.update(taken)
        return taken

    def holds(self, subject: str) -> bool:
        return subject in self._held

    async def renew(self) -> None:
        return

    async def release(self, subjects: Sequence[str]) -> None:
        self._held.difference_update(subjects)

    async def close(self) -> None:
        self._held.clear()


class RedisClaims:
    """Shared by all gateways of a Redis."""

    def __init__(self, redis: settings.Redis, lease_s: float, clock: Callable[[], float]) -> None:
        self._redis = RedisServer(redis).client(CONNECTIONS)
        self._prefix = f"{{{redis.prefix}}}:claims:"
        self._timeout_s = redis.call_timeout_s
        self._lease_s = lease_s
        self._settle_s = 2 * renewal_s(lease_s)
        self._clock = clock
        self._holder = secrets.token_hex(16)
        self._until: dict[str, float] = {}

    async def check(self) -> None:
        if await self._asked(self._redis.ping()) is None:
            raise DependencyUnavailable("Batches cannot be taken on now. Please try again.", retry_after_s=2)

    async def take(self, subjects: Sequence[str], count: int = 1) -> list[str]:
        now = self._clock()
        offered = [subject for subject in subjects if subject not in self._until][:SUBJECTS_PER_CALL]
        if not offered:
            return []
        taken = await self._call(_TAKE, offered, str(count)) or []
        self._until.update(dict.fromkeys(taken, now + self._lease_s))
        return taken

    def holds(self, subject: str) -> bool:
        return self._clock() < self._until.get(subject, 0.0)

    async def renew(self) -> None:
        now, held = self._clock(), list(self._until)
        for start in range(0, len(held) or 1, SUBJECTS_PER_CALL):
            some = held[start : start + SUBJECTS_PER_CALL]
            lost = await self._call(_RENEW, some)
            if lost is None:
                return
            for subject in some:
                if subject in self._until:
                    self._until[subject] = now + self._lease_s
            for subject in lost:
                self._until.pop(subject, None)

    async def release(self, subjects: Sequence[str]) -> None:
        held = [subject for subject in subjects if self._until.pop(subject, None) is not None]
        if held:
            await self._call(_RELEASE, held)

    async def close(self) -> None:
        await self.release(list(self._until)[:SUBJECTS_PER_CALL])
        with suppress(RedisError, OSError):
            await self._redis.aclose()

    async def _call(self, script: str, subjects: Sequence[str], *arguments: str) -> list[str] | None:
        keys = [self._prefix + subject for subject in (OPENING, *subjects)]
        given = (self._holder, str(int(self._lease_s * 1000)), str(int(self._settle_s * 1000)), *arguments)
        answer = await self._asked(self._redis.eval(script, len(keys), *keys, *given))
        if not isinstance(answer, list):
            return None if answer is None else []
        return [key.decode().removeprefix(self._prefix) for key in answer]

    async def _asked(self, call: Awaitable[Any] | Any) -> Any:
        """The answer, None if there was none."""
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                return await call
        except (RedisError, OSError, TimeoutError):
            return None
