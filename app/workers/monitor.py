"""The monitor: finds out the condition of every worker, over HTTP, for as long as it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx

from app.inference import Route
from app.settings import Health
from app.workers import worker as transitions
from app.workers.registry import Registry
from app.workers.vllm_metrics import parse_engine_load
from app.workers.worker import State, Worker

METRICS_MAX_BYTES = 4 * 1024 * 1024
REASON_CHARS = 300
# The least work that proves a model, by its kind: a generating, an embedding, a scoring one. It offers one of them.
CANARIES: tuple[tuple[Route, dict[str, Any]], ...] = (
    (Route.COMPLETIONS, {"prompt": "1", "max_tokens": 1}),
    (Route.EMBEDDINGS, {"input": "1"}),
    (Route.SCORE, {"text_1": "1", "text_2": "1"}),
)


class NotProven(Exception):
    """The worker answers, and is still not fit to serve."""


class Monitor:
    """Watches each worker in a task of its own, so that a slow one delays nobody."""

    def __init__(self, registry: Registry, settings: Health) -> None:
        self._registry = registry
        self._settings = settings
        self._due: dict[str, asyncio.Event] = {worker.id: asyncio.Event() for worker in registry}
        registry.listen(self._look_again)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(
                httpx.AsyncClient(timeout=self._settings.probe_timeout_s, trust_env=False)
            )
            tasks = [asyncio.create_task(self._watch(client, worker)) for worker in self._registry]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _look_again(self, worker: Worker) -> None:
        """A state changed somewhere else (a request failed): do not wait for the next round."""
        self._due[worker.id].set()

    async def _watch(self, client: httpx.AsyncClient, worker: Worker) -> None:
        due = self._due[worker.id]
        while True:
            await self._round(client, worker)
            due.clear()
            try:
                async with asyncio.timeout(self._settings.probe_interval_s):
                    await due.wait()
            except TimeoutError:
                continue

    async def _round(self, client: httpx.AsyncClient, worker: Worker) -> None:
        """One look at one worker. Never raises: whatever a worker answers, it is watched on."""
        try:
            await self._probe(client, worker)
            if worker.condition.state is not State.READY:
                await self._prove(client, worker)
            await self._read_load(client, worker)
        except NotProven as error:
            self._change(worker, transitions.unproven(worker.condition, str(error)))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            self._change(
                worker, transitions.missed(worker.condition, reason[:REASON_CHARS], self._settings.probe_misses)
            )

    def _change(self, worker: Worker, condition: transitions.Condition) -> None:
        self._registry.change(worker, condition)
        self._due[worker.id].clear()

    async def _probe(self, client: httpx.AsyncClient, worker: Worker) -> None:
        response = await client.get(f"http://{worker.id}/health")
        response.raise_for_status()
        self._change(worker, transitions.probed(worker.condition))

    async def _prove(self, client: httpx.AsyncClient, worker: Worker) -> None:
        """Ready means: serves the model we think it serves, and has just generated a token of it."""
        served = worker.address.served_model
        models = await client.get(f"http://{worker.id}/v1/models")
        entries = [entry for entry in _list(_object(models).get("data")) if isinstance(entry, dict)]
        mine = next((entry for entry in entries if entry.get("id") == served), None)
        if mine is None:
            names = ", ".join(str(entry.get("id")) for entry in entries)
            raise NotProven(f"serves {names or 'nothing'}, not {served}"[:REASON_CHARS])
        length = mine.get("max_model_len")
        worker.context_length = length if isinstance(length, int) else None
        await self._canary(client, worker)
        self._change(worker, transitions.proven(worker.condition))

    async def _canary(self, client: httpx.AsyncClient, worker: Worker) -> None:
        for route, fields in CANARIES:
            response = await self._ask(client, worker, route, {"model": worker.address.served_model, **fields})
            if response.status_code != httpx.codes.NOT_FOUND:
                break
        if response.status_code != httpx.codes.OK:
            raise NotProven(f"one token asked, answered {response.status_code}: {_message(response)}"[:REASON_CHARS])

    async def _ask(
        self, client: httpx.AsyncClient, worker: Worker, route: Route, body: dict[str, Any]
    ) -> httpx.Response:
        return await client.post(f"http://{worker.id}{route}", json=body, timeout=self._settings.canary_timeout_s)

    async def _read_load(self, client: httpx.AsyncClient, worker: Worker) -> None:
        """Load is advice: a worker without readable metrics is served by our own counts, and stays as it is."""
        try:
            async with (
                asyncio.timeout(self._settings.probe_timeout_s),
                client.stream("GET", f"http://{worker.id}/metrics") as response,
            ):
                text = await _bounded_text(response, METRICS_MAX_BYTES)
            worker.load = parse_engine_load(text) if response.is_success else None
        except (httpx.HTTPError, TimeoutError):
            worker.load = None


async def _bounded_text(response: httpx.Response, limit_bytes: int) -> str:
    """The first `limit_bytes` of the body; the rest of a body that is longer is never read."""
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > limit_bytes:
            break
    return body[:limit_bytes].decode("utf-8", "replace")


def _object(response: httpx.Response) -> dict[str, Any]:
    response.raise_for_status()
    try:
        value = response.json()
    except ValueError:
        raise NotProven("answers /v1/models with something that is not JSON") from None
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:REASON_CHARS]
