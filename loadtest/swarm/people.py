"""Who asks, and what: tenants and their keys, bands, conversations that grow turn by turn. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loadtest.conversations import Conversation, Workload, conversations

BANDS = ("priority", "default", "flex")


@dataclass(frozen=True, slots=True)
class Caller:
    """One user's place: `key` is shown as a bearer token, empty where nobody asks for keys."""

    tenant: str
    key: str
    band: str


def parse_keys(text: str) -> dict[str, str]:
    """Keys by tenant, from `tenant=key` lines or words apart by commas; `#` starts a comment. Raises ValueError.

    A message never holds what may be a key.
    """
    keys: dict[str, str] = {}
    words = (word.strip() for line in text.splitlines() for word in line.partition("#")[0].split(","))
    for number, word in enumerate(filter(None, words), start=1):
        tenant, equals, key = (part.strip() for part in word.partition("="))
        if not (tenant and equals and key):
            raise ValueError(f"key {number} is not of the form tenant=key")
        keys[tenant] = key
    return keys


def parse_bands(text: str) -> dict[str, float]:
    """Shares by band, from `priority=1,default=6,flex=3`. Raises ValueError."""
    shares: dict[str, float] = {}
    for word in text.split(","):
        band, _, share = (part.strip() for part in word.partition("="))
        if band not in BANDS:
            raise ValueError(f"unknown band {band!r}; known: {', '.join(BANDS)}")
        shares[band] = float(share or 1)
    if min(shares.values()) < 0 or not sum(shares.values()):
        raise ValueError("shares of bands are positive numbers")
    return shares


def callers(keys: Mapping[str, str], shares: Mapping[str, float], seed: int) -> Iterator[Caller]:
    """Endless users: tenants in turn, bands drawn by their shares."""
    source = random.Random(f"callers {seed}")
    tenants = list(keys.items()) or [("", "")]
    bands, weights = list(shares), list(shares.values())
    while True:
        for tenant, key in tenants:
            yield Caller(tenant, key, source.choices(bands, weights)[0])


def population(load: Workload, seed: int) -> Iterator[Conversation]:
    """Endless conversations: the system prompts stay the same and are shared, no question is asked twice."""
    systems = [talk.messages[0] for talk in conversations(load, seed, "")[: load.systems]]
    for again in range(1, 1 << 30):
        for at, talk in enumerate(conversations(load, seed + again, "")):
            talk.messages[0] = systems[at % len(systems)]
            yield talk


def think_s(source: random.Random, mean_s: float) -> float:
    """How long somebody reads and types before the next turn: exponential, at most five times its mean."""
    return min(5 * mean_s, source.expovariate(1 / mean_s)) if mean_s > 0 else 0.0


def answer_tokens(source: random.Random, median: int) -> int:
    """A length between half and twice the median, evenly on a logarithmic scale."""
    return max(1, round(median * math.exp2(source.uniform(-1, 1))))
