"""Copies of requests for a second variant, whose answers are compared and never returned.

A copy waits in the `batch` band, on nobody's account, and only while nothing else waits; there are never more of a
model's under way than it allows. Of the two answers two numbers are kept, and no text.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

from app import settings
from app.catalogue import Model, Variant
from app.errors import GatewayError
from app.inference import InferenceRequest
from app.preference import NO_PREFERENCE
from app.relay.answer import Answer, StreamedAnswer, WholeAnswer
from app.relay.tap import TappedStream, text_of
from app.routing.variant_choice import point_of
from app.telemetry.account import Account
from app.telemetry.metrics import Metrics
from app.tenant import Band, Tenant

PATIENCE_S = 10.0
SHADOW = Tenant("shadow")
"""Who pays for copies: nobody that has limits."""


class Replied(Protocol):
    """What a shadow needs of a reply."""

    answer: Answer


Serve = Callable[[InferenceRequest], Any]


class Shadows:
    """Offers copies of what is served. Enter `running` before use; without it nothing is copied."""

    def __init__(self, waiting: Callable[[], int], metrics: Metrics, clock: Callable[[], float]) -> None:
        """`waiting` tells how many requests wait for a slot."""
        self._waiting = waiting
        self._metrics = metrics
        self._clock = clock
        self._serve: Serve | None = None
        self._open: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self, serve: Serve) -> AsyncIterator[None]:
        """Copies go to `serve`; those under way at the end are given up."""
        self._serve = serve
        try:
            yield
        finally:
            self._serve = None
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def follow(
        self, answer: Answer, request: InferenceRequest, model: Model, served: Variant, account: Account
    ) -> Answer:
        """`answer`, or the same one overheard, so that a copy of its request can be compared with it."""
        shadow = model.choosing.shadow
        if shadow is None or not is_copied(request, shadow, served):
            return answer
        if type(answer) is StreamedAnswer:
            return TappedStream(answer, request, account, self._clock, lambda text: self._send(request, model, text))
        if isinstance(answer, WholeAnswer):
            self._send(request, model, text_of(answer.body))
        return answer

    def _send(self, request: InferenceRequest, model: Model, text: str | None) -> None:
        """Compare with a copy, unless there is something better to do."""
        shadow = model.choosing.shadow
        if shadow is None or text is None or self._serve is None:
            return
        if self._waiting() or self._open[model.name] >= shadow.concurrency:
            self._count(model, shadow, "dropped")
            return
        self._open[model.name] += 1
        copy = copy_of(request, f"{model.name}:{shadow.variant}", self._clock())
        task = asyncio.create_task(self._compare(self._serve, copy, model, shadow, text))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(
        self, serve: Serve, copy: InferenceRequest, model: Model, shadow: settings.Shadow, text: str
    ) -> None:
        try:
            other = await _answered(serve, copy)
        except GatewayError:
            self._count(model, shadow, "failed")
            return
        finally:
            self._open[model.name] -= 1
        self._count(model, shadow, "compared" if other is not None else "failed")
        if other is not None:
            labels = (model.name, shadow.variant)
            self._metrics.shadow_agreement.labels(*labels).observe(agreement(text, other))
            self._metrics.shadow_length.labels(*labels).observe((len(other) + 1) / (len(text) + 1))

    def _count(self, model: Model, shadow: settings.Shadow, outcome: str) -> None:
        self._metrics.shadows.labels(model.name, shadow.variant, outcome).inc()


async def _answered(serve: Serve, copy: InferenceRequest) -> str | None:
    reply: AbstractContextManager[Replied] = await serve(copy)
    with reply as opened:
        return text_of(await opened.answer.next())


def is_copied(request: InferenceRequest, shadow: settings.Shadow, served: Variant) -> bool:
    """Whether `request` is among the share that is copied; batches and copies never are."""
    if request.band is Band.BATCH or not request.weighs_tokens or served.name == shadow.variant:
        return False
    return point_of(request.id) * 100 < shadow.percent


def copy_of(request: InferenceRequest, model: str, now: float) -> InferenceRequest:
    fields = {name: raw for name, raw in request.fields.items() if name not in ("stream", "stream_options")}
    return replace(
        request,
        id=f"{request.id}-shadow",
        client_id="",
        model=model,
        stream=False,
        client_wants_usage=False,
        fields=fields,
        band=Band.BATCH,
        tenant=SHADOW,
        arrived=now,
        deadline=now + PATIENCE_S,
        preference=NO_PREFERENCE,
        trace_headers=(),
        wants_queue_events=False,
        on_wait=None,
    )


def agreement(one: str, other: str) -> float:
    """Sørensen and Dice's coefficient of the words of two texts: 1 for the same words, 0 for none in common."""
    words, others = Counter(one.split()), Counter(other.split())
    total = words.total() + others.total()
    return 2 * (words & others).total() / total if total else 1.0
