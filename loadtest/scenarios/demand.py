"""What is asked, by whom and when. Pure, and the same for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loadtest.client import CHAT_PATH, Address
from loadtest.pacing import NS, poisson_times

MODEL = "m"
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `due_s` counts from the start of the load; `patience_s` is how long its client waits for a slot."""

    name: str
    due_s: float
    band: str
    tenant: str
    prompt_tokens: int
    output_tokens: int
    patience_s: float

    def named(self, name: str) -> Ask:
        return replace(self, name=name)

    def encode(self, address: Address) -> bytes:
        """The whole request as it goes on the wire; the message begins with the name, so no prompt is like another."""
        filling = "word " * (self.prompt_tokens * BYTES_PER_TOKEN // 5 + 1)
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"{self.name} {filling}"[: self.prompt_tokens * BYTES_PER_TOKEN]}],
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "service_tier": self.band,
        }
        content = json.dumps(body).encode()
        head = (
            f"POST {CHAT_PATH} HTTP/1.1\r\nhost: {address.host}:{address.port}\r\ncontent-type: application/json\r\n"
            f"x-sluice-tenant: {self.tenant}\r\nx-sluice-timeout-ms: {round(self.patience_s * 1000)}\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content


@dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens of prompts and outputs: log-normal between bounds, as lengths of chats are."""

    prompt_median: int = 80
    prompt_bounds: tuple[int, int] = (16, 400)
    output_median: int = 32
    output_bounds: tuple[int, int] = (8, 128)
    spread: float = 0.6

    def draw(self, chance: random.Random) -> tuple[int, int]:
        prompt = _within(self.prompt_bounds, chance.lognormvariate(0.0, self.spread) * self.prompt_median)
        output = _within(self.output_bounds, chance.lognormvariate(0.0, self.spread) * self.output_median)
        return prompt, output


def _within(bounds: tuple[int, int], value: float) -> int:
    return min(max(round(value), bounds[0]), bounds[1])


@dataclass(frozen=True, slots=True)
class Stream:
    """Independent callers of one kind, `rate` requests a second in all; each belongs to one of `tenants`, by lot."""

    rate: float
    band: str = "default"
    tenants: tuple[str, ...] = ("anybody",)
    patience_s: float = 4.0


def asks(label: str, streams: Sequence[Stream], seconds: float, sizes: Sizes, seed: int) -> list[Ask]:
    """Poisson arrivals of all streams, in order. Names begin with `label` and are unique within it."""
    found = []
    for place, stream in enumerate(streams):
        chance = random.Random(f"{seed} {label} {place}")
        for at_ns in poisson_times(stream.rate, seconds, chance.getrandbits(64)):
            prompt, output = sizes.draw(chance)
            tenant = chance.choice(stream.tenants)
            found.append(Ask("", at_ns / NS, stream.band, tenant, prompt, output, stream.patience_s))
    found.sort(key=lambda ask: ask.due_s)
    return [ask.named(f"{label}-{number}") for number, ask in enumerate(found)]


def endless(label: str, sizes: Sizes, seed: int, patience_s: float = 60.0) -> Iterator[Ask]:
    """Requests for a closed loop: whoever is free asks the next one."""
    chance = random.Random(f"{seed} {label}")
    number = 0
    while True:
        prompt, output = sizes.draw(chance)
        yield Ask(f"{label}-{number}", 0.0, "default", "anybody", prompt, output, patience_s)
        number += 1
