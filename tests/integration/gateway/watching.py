"""Somebody who watches a gateway's live data, as the console does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

LIVE = "/admin/live"
DEADLINE_S = 20.0


class Watching:
    """The snapshots of one viewer, the latest that came."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.aiter_lines()

    async def snapshot(self) -> dict[str, Any]:
        """The next one. Raises StopAsyncIteration when the stream has ended."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                line = await anext(self._lines)
                if line.startswith("data: "):
                    found: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    return found

    async def ended(self) -> None:
        """Wait until the stream ends, properly."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                while True:
                    await self.snapshot()
            except StopAsyncIteration:
                return


@asynccontextmanager
async def watching(http: httpx.AsyncClient, **headers: str) -> AsyncIterator[Watching]:
    async with http.stream("GET", LIVE, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        yield Watching(answer)
