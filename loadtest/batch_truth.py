"""A batch, while its worker, its gateways and Valkey are killed and put to sleep, again and again (row L9).

In the end every line must have exactly one record, and at every poll the counts must have been right and growing.
What was computed twice is read from the workers' own record, which no kill can take back.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtest.victims import Victim, fake_worker, gateway, started, valkey

SLOTS = 16
READY_S = 90.0
POLL_S = 0.5
FINAL = frozenset({"completed", "failed", "expired", "cancelled"})
ORDER = ("validating", "in_progress", "finalizing", "completed")


@dataclass(frozen=True)
class TruthPlan:
    """`every_s`: the shortest and the longest time between two hits; `pause_s` of a sleep; `hits` at the most."""

    lines: int = 50_000
    every_s: tuple[float, float] = (5.0, 10.0)
    pause_s: tuple[float, float] = (1.0, 20.0)
    tokens: int = 4
    itl_ms: float = 25.0
    workers: int = 2
    gateways: int = 2
    seed: int = 1
    hits: int = 10_000
    limit_s: float = 3600.0


@dataclass(slots=True)
class Truth:
    """What came of it."""

    records: int = 0
    ids: int = 0
    failed: int = 0
    twice: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    polls: int = 0
    unanswered: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def faults(self, plan: TruthPlan) -> list[str]:
        """Where the promise was not kept."""
        found = list(self.wrong)
        if self.records != plan.lines or self.ids != plan.lines:
            found.append(f"{self.records} records of {self.ids} ids for {plan.lines} lines")
        if self.failed:
            found.append(f"{self.failed} lines failed")
        if self.twice > 0.02 * plan.lines:
            found.append(f"{self.twice} lines were computed twice")
        return found


async def measure(plan: TruthPlan, place: Path) -> Truth:
    """Run it below `place`, an empty directory. Raises TimeoutError when it does not come to an end."""
    record = place / "answered"
    pace = ("--itl-ms", str(plan.itl_ms), "--record", str(record))
    workers = [fake_worker(place, number, *pace) for number in range(plan.workers)]
    server = valkey(place)
    config = {
        "redis": {"url": f"redis://127.0.0.1:{server.address.port}/0"},
        "models": [_model(workers)],
        "admission": {"replicas": plan.gateways},
        "batches": {"directory": str(place / "kept")},
        "logs": {"requests": "none"},
    }
    gateways = [gateway(place, number, config) for number in range(plan.gateways)]
    async with started(server, *workers, *gateways), httpx.AsyncClient(timeout=5) as http:
        asking = _Asking(http, gateways)
        await asking.ready()
        return await _hit_and_follow(plan, asking, [server, *workers, *gateways], record)


async def _hit_and_follow(plan: TruthPlan, asking: _Asking, victims: Sequence[Victim], record: Path) -> Truth:
    truth, began = Truth(), time.monotonic()
    batch = await asking.begin(plan)
    hitting = asyncio.create_task(_hit(plan, victims, truth))
    try:
        async with asyncio.timeout(plan.limit_s):
            batch = await _follow(asking, batch, truth)
    finally:
        hitting.cancel()
        await asyncio.gather(hitting, return_exceptions=True)
        for victim in victims:
            victim.resume()
    truth.seconds = time.monotonic() - began
    told = Counter[str]()
    for name in ("output_file_id", "error_file_id"):
        for text in (await asking.content(batch[name])).splitlines() if batch[name] else ():
            told[json.loads(text)["custom_id"]] += 1
    truth.records, truth.ids = told.total(), len(told)
    truth.failed = batch["request_counts"]["failed"]
    answered = Counter(text for text in record.read_text().splitlines() if text)
    truth.twice = answered.total() - len(answered)
    return truth


async def _hit(plan: TruthPlan, victims: Sequence[Victim], truth: Truth) -> None:
    """One after another: what was hit is well again before the next is chosen, but for those that sleep."""
    lot = random.Random(plan.seed)
    kinds = sorted({victim.name.rstrip("0123456789") for victim in victims})
    waking: set[asyncio.Task[None]] = set()
    try:
        while truth.hits.total() < plan.hits:
            await asyncio.sleep(lot.uniform(*plan.every_s))
            kind = lot.choice(kinds)
            victim = lot.choice([one for one in victims if one.name.rstrip("0123456789") == kind])
            if victim.is_paused:
                continue
            how = lot.choice(("kill", "pause"))
            truth.hits[f"{kind} {how}"] += 1
            print(f"  {how} {victim.name}", flush=True)
            if how == "kill":
                await victim.kill()
                await asyncio.sleep(lot.uniform(0, 2))
                await victim.start()
            else:
                victim.pause()
                waking.add(asyncio.create_task(_wake(victim, lot.uniform(*plan.pause_s))))
        await asyncio.gather(*waking)
    finally:
        for task in waking:
            task.cancel()


async def _wake(victim: Victim, after_s: float) -> None:
    await asyncio.sleep(after_s)
    victim.resume()


async def _follow(asking: _Asking, batch: dict[str, Any], truth: Truth) -> dict[str, Any]:
    """The batch at its end; notes every poll that shows a step back."""
    while batch["status"] not in FINAL:
        await asyncio.sleep(POLL_S)
        later = await asking.poll(batch["id"])
        if later is None:
            truth.unanswered += 1
            continue
        truth.polls += 1
        before, after = batch["request_counts"], later["request_counts"]
        if after["completed"] < before["completed"] or after["failed"] < before["failed"]:
            truth.wrong.append(f"counts went from {before} to {after}")
        if after["completed"] + after["failed"] > after["total"]:
            truth.wrong.append(f"counts exceed the total: {after}")
        if ORDER.index(later["status"]) < ORDER.index(batch["status"]):
            truth.wrong.append(f"the status went from {batch['status']} to {later['status']}")
        if after["completed"] // 5000 > before["completed"] // 5000:
            print(f"  {after['completed']} of {after['total']}", flush=True)
        batch = later
    return batch


class _Asking:
    """Asks whichever gateway answers."""

    def __init__(self, http: httpx.AsyncClient, gateways: Sequence[Victim]) -> None:
        self._http = http
        self._gateways = gateways
        self._lot = random.Random(0)

    async def ready(self) -> None:
        async with asyncio.timeout(READY_S):
            for one in self._gateways:
                while not await self._is_ready(one):
                    await asyncio.sleep(0.2)

    async def begin(self, plan: TruthPlan) -> dict[str, Any]:
        file = await self._ask("POST", "/v1/files", data={"purpose": "batch"}, files={"file": ("in", _input(plan))})
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return await self._ask("POST", "/v1/batches", json=asked)

    async def poll(self, batch_id: str) -> dict[str, Any] | None:
        one = self._lot.choice(self._gateways)
        with suppress(httpx.TransportError):
            answer = await self._http.get(f"{one.address.url}/v1/batches/{batch_id}")
            if answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                return found
        return None

    async def content(self, file_id: str) -> str:
        async with asyncio.timeout(READY_S):
            while True:
                for one in self._gateways:
                    with suppress(httpx.TransportError):
                        answer = await self._http.get(f"{one.address.url}/v1/files/{file_id}/content", timeout=60)
                        if answer.status_code == 200:
                            return answer.text
                await asyncio.sleep(POLL_S)

    async def _is_ready(self, one: Victim) -> bool:
        with suppress(httpx.TransportError):
            return (await self._http.get(f"{one.address.url}/readyz")).status_code == 200
        return False

    async def _ask(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        answer = await self._http.request(method, f"{self._gateways[0].address.url}{path}", timeout=120, **given)
        told: dict[str, Any] = answer.raise_for_status().json()
        return told


def _input(plan: TruthPlan) -> bytes:
    def text(number: int) -> bytes:
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "m", "messages": messages, "max_tokens": plan.tokens, "user": f"line{number}"}
        line = {"custom_id": f"line{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(line).encode() + b"\n"

    return b"".join(map(text, range(plan.lines)))


def _model(workers: Sequence[Victim]) -> dict[str, Any]:
    listed = [{"url": one.address.url, "served_model": "m", "max_concurrency": SLOTS} for one in workers]
    return {"name": "m", "variants": [{"name": "v", "workers": listed}]}


def figures(truth: Truth, plan: TruthPlan) -> str:
    hits = ", ".join(f"{name} {count}" for name, count in sorted(truth.hits.items())) or "none"
    return (
        f"{plan.lines} lines in {truth.seconds:.0f} s: {truth.records} records, {truth.ids} ids, "
        f"{truth.failed} failed, {truth.twice} computed twice ({truth.twice / plan.lines:.2%}); "
        f"{truth.polls} polls, {truth.unanswered} unanswered; hits: {hits}"
    )
