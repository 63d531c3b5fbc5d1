"""What clients may do with batches and files, and the cast that does the rest."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from app import settings
from app.batches.batch import Batch, Cancelled, Created, IllegalEvent, Progress, Status
from app.batches.claims import Claims
from app.batches.files import FileRecord, Files
from app.batches.journal import Journal
from app.batches.runner import Runner
from app.errors import Conflict, InvalidValue, TenantQueueFull
from app.inference import Route

ENDPOINTS = (Route.CHAT, Route.COMPLETIONS, Route.EMBEDDINGS)
WINDOW = re.compile(r"([1-9][0-9]{0,4})([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
WINDOW_MAX_S = 30 * 86400


@dataclass(frozen=True, slots=True)
class Asked:
    """A batch as a client asks for it; `body` is what it sent, `key` its Idempotency-Key."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None
    outputs_kept_s: int | None
    body: bytes
    key: str | None


class Batches:
    """The batches and files of all tenants. Methods raise GatewayError; `now` is wall time in seconds."""

    def __init__(
        self,
        files: Files,
        journal: Journal,
        claims: Claims,
        runner: Runner,
        limits: settings.Batches,
        now: Callable[[], float],
    ) -> None:
        self.files = files
        self.limits = limits
        self._journal = journal
        self._claims = claims
        self._runner = runner
        self._now = now

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self._runner.running():
            yield

    async def create(self, tenant: str, asked: Asked) -> Batch:
        """A new batch, which from now on survives anything but the loss of the storage."""
        endpoint, window_s = _endpoint(asked.endpoint), _window_s(asked.completion_window)
        await self._claims.check()
        file = await self.files.find(tenant, asked.input_file_id)
        if file.purpose != "batch":
            raise InvalidValue("The input file must have the purpose 'batch'.", param="input_file_id")
        if await self._journal.count_active(tenant) >= self.limits.batches_per_tenant:
            raise TenantQueueFull("You have too many unfinished batches.", retry_after_s=60)
        batch_id = await self._journal.reserve(tenant, asked.key, asked.body)
        at = int(self._now())
        created = Created(
            at=at,
            id=batch_id,
            tenant=tenant,
            endpoint=endpoint,
            input_file_id=file.id,
            completion_window=asked.completion_window,
            expires_at=at + window_s,
            metadata=asked.metadata,
            outputs_kept_s=asked.outputs_kept_s or self.limits.files_kept_s,
        )
        batch = await self._journal.create(created)
        self._runner.wake()
        return batch

    async def find(self, tenant: str, batch_id: str) -> tuple[Batch, Progress]:
        return await self._journal.view(await self._journal.find(tenant, batch_id))

    async def page(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[tuple[Batch, Progress]], bool]:
        page, has_more = await self._journal.page(tenant, after=after, limit=limit)
        return [await self._journal.view(batch) for batch in page], has_more

    async def unfinished(self, most: int) -> list[tuple[Batch, Progress]]:
        """The newest of all tenants' batches that are not finished, for operators."""
        found = [await self._journal.find_active(batch_id) for batch_id in (await self._journal.active())[-most:]]
        return [await self._journal.view(batch) for batch in reversed(found) if batch is not None]

    async def cancel(self, tenant: str, batch_id: str) -> tuple[Batch, Progress]:
        """Asking twice is asking once."""
        batch = await self._journal.find(tenant, batch_id)
        if batch.status not in (Status.CANCELLING, Status.CANCELLED):
            try:
                batch = await self._journal.happen(batch, Cancelled(at=int(self._now())))
            except IllegalEvent:
                now = await self._journal.find(tenant, batch_id)
                raise Conflict(f"Cannot cancel a batch with status '{now.status}'.", param="id") from None
            self._runner.wake()
        return await self._journal.view(batch)

    async def delete_file(self, tenant: str, file_id: str) -> FileRecord:
        """Raises Conflict for the input of a batch that is not finished."""
        file = await self.files.find(tenant, file_id)
        for batch_id in await self._journal.active():
            batch = await self._journal.find_active(batch_id)
            if batch is not None and not batch.status.is_final and batch.created.input_file_id == file_id:
                raise Conflict(f"The file is the input of {batch.id}, which is not finished.", param="id")
        await self.files.delete(tenant, file_id)
        return file


def _endpoint(text: str) -> Route:
    if text not in ENDPOINTS:
        raise InvalidValue(f"Invalid value for 'endpoint': expected one of {', '.join(ENDPOINTS)}.", param="endpoint")
    return Route(text)


def _window_s(text: str) -> int:
    match = WINDOW.fullmatch(text)
    seconds = int(match[1]) * SECONDS[match[2]] if match else 0
    if not 0 < seconds <= WINDOW_MAX_S:
        raise InvalidValue(
            "Invalid value for 'completion_window': expected '24h', or another number of s, m, h or d up to 30d.",
            param="completion_window",
        )
    return seconds
