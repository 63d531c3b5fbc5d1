"""A whole gateway, and the fake workers behind it, inside a test's own event loop: everything is at hand."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from app import settings
from app.admission.local import LocalAdmission
from app.errors import GatewayError
from app.gateway import Gateway
from app.inference import Band, InferenceRequest, Outcome, Route
from app.runtime import Runtime, open_runtime
from app.tenant import ANONYMOUS, Tenant
from app.workers.worker import State, Worker

PATIENCE_S = 20.0
"""How long what must come may take: only failures wait for it."""

# Often and soon; how long a worker may be silent is what it is outside of tests, for these share its event loop.
HEALTH = {"probe_interval_s": 0.1, "slow_start_s": 0.0}
HASTY = {"probe_timeout_s": 0.2, "canary_timeout_s": 0.5, "progress_canary_timeout_s": 0.3}
"""For workers that fall silent."""


class Address(Protocol):
    """What the gateway is told of a worker."""

    @property
    def url(self) -> str: ...


@dataclass
class Told:
    """What a client was told: the parts of an answer, or an error; `whole` is whether the answer ended cleanly."""

    parts: list[bytes] = field(default_factory=list)
    error: GatewayError | None = None
    whole: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def code(self) -> str:
        """The error's code, also of an error inside a stream; empty for none."""
        if self.error is not None:
            return self.error.code
        last = self.parts[-1] if self.parts else b""
        return str(json.loads(last[6:])["error"]["code"]) if last.startswith(b'data: {"error"') else ""

    @property
    def ok(self) -> bool:
        return self.whole and not self.code


def request(content: str = "hi", *, stream: bool = False, tenant: str = "", **fields: Any) -> InferenceRequest:
    """A chat request for `m`; with `max_tokens` its answer has exactly so many."""
    if "max_tokens" in fields:
        fields["ignore_eos"] = True
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "stream": stream, **fields}
    raw = json.dumps(body).encode()
    parsed = InferenceRequest.parse(raw, request_id="r", route=Route.CHAT, arrived=time.monotonic())
    parsed.tenant = Tenant(tenant) if tenant else ANONYMOUS
    return parsed


class House:
    """A gateway for the model `m` on some workers."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.gateway: Gateway = runtime.gateway
        admission = runtime.gateway._admission
        assert isinstance(admission, LocalAdmission)
        self.admission = admission
        self._changed = asyncio.Event()
        runtime.registry.listen(lambda worker: self._changed.set())

    def known(self, worker: Address) -> Worker:
        """What the gateway knows of a worker."""
        return self.runtime.registry[worker.url.removeprefix("http://")]

    async def becomes(self, worker: Address, *states: State, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the gateway believes that the worker is in one of these states. Raises TimeoutError."""
        known = self.known(worker)
        try:
            async with asyncio.timeout(timeout_s):
                while known.condition.state not in states:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"not {states} within {timeout_s} s, but {known.condition}") from None

    async def ask(self, content: str = "hi", *, stream: bool = False, **fields: Any) -> Told:
        """One request, its answer read to the end."""
        told = Told()
        await self.read(request(content, stream=stream, **fields), told)
        return told

    async def read(self, asked: InferenceRequest, told: Told) -> None:
        """Serve a request and read its answer into `told`, part by part."""
        try:
            with await self.gateway.serve(asked) as reply:
                while part := await reply.answer.next():
                    told.parts.append(part)
                told.whole = reply.answer.is_whole
        except GatewayError as error:
            told.error = error

    async def ask_many(self, count: int, at_once: int, **fields: Any) -> list[Told]:
        """`count` requests by `at_once` clients, each of which asks again when it was answered."""
        told: list[Told] = []

        async def client(share: int) -> None:
            told.extend([await self.ask(**fields) for _ in range(share)])

        shares = [count // at_once + (place < count % at_once) for place in range(at_once)]
        await asyncio.gather(*map(client, shares))
        return told

    def metric(self, name: str, **labels: str) -> float:
        """All samples of `name` that have these labels, added up."""
        families = self.runtime.metrics._registry.collect()
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def ended(self) -> int:
        """Requests that were counted, whatever their outcome."""
        return int(self.metric("sluice_requests_total"))

    def cancelled(self) -> int:
        return int(self.metric("sluice_requests_total", outcome=Outcome.CANCELLED))

    @property
    def is_clean(self) -> bool:
        """Nothing is held, nothing waits, nothing is counted as in flight."""
        workers = list(self.runtime.registry)
        return (
            all(worker.in_flight == 0 and self.admission.held(worker.id) == 0 for worker in workers)
            and not any(self.admission.waiting(band) for band in Band)
            and self.metric("sluice_requests_in_flight") == 0
            and not any(upstream._carrying for upstream in self.gateway._relay._upstreams.values())
        )


@asynccontextmanager
async def house(
    *workers: Address,
    slots: int | Literal["auto"] = 8,
    ready: Sequence[Address] | None = None,
    relay: dict[str, float] | None = None,
    health: dict[str, float] | None = None,
    admission: dict[str, float] | None = None,
    logs: dict[str, str] | None = None,
) -> AsyncIterator[House]:
    """A gateway on `workers`, all of them (or those in `ready`) proven; in the end nothing may be left of a request."""
    listed = tuple(settings.Worker(url=worker.url, served_model="m", max_concurrency=slots) for worker in workers)
    configured = settings.Settings(
        models=(settings.Model(name="m", variants=(settings.Variant(name="v", workers=listed),)),),
        relay=settings.Relay(**(relay or {})),
        health=settings.Health(**{**HEALTH, **(health or {})}),
        admission=settings.Admission(**(admission or {})),
        logs=settings.Logs(**{"level": "error", "requests": "none", **(logs or {})}),
    )
    async with open_runtime(configured) as runtime:
        home = House(runtime)
        for worker in workers if ready is None else ready:
            await home.becomes(worker, State.READY)
        yield home
        async with asyncio.timeout(PATIENCE_S):
            while not home.is_clean:
                await asyncio.sleep(0.01)
