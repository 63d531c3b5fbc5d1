"""The monitor: finds out the condition of every worker, over HTTP, for as long as it runs."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from app.catalogue import WorkerAddress
from app.credentials import tls_failure
from app.inference import Route
from app.settings import Health
from app.workers import worker as transitions
from app.workers.capacity import is_ramping, strangers_in
from app.workers.registry import Registry
from app.workers.versions import doubt_about
from app.workers.vllm_metrics import parse_engine_load
from app.workers.worker import State, Worker

METRICS_MAX_BYTES = 4 * 1024 * 1024
REASON_CHARS = 300
RAMP_STEPS = 10
RETURN_INTERVAL_S = 1.0
# The least work that proves a model, by its kind: a generating, an embedding, a scoring one. It offers one of them.
CANARIES: tuple[tuple[Route, dict[str, Any]], ...] = (
    (Route.COMPLETIONS, {"prompt": "1", "max_tokens": 1}),
    (Route.EMBEDDINGS, {"input": "1"}),
    (Route.SCORE, {"text_1": "1", "text_2": "1"}),
)


class NotProven(Exception):
    """The worker answers, and is still not fit to serve."""


class Monitor:
    """Watches each worker in a task of its own, so that a slow one delays nobody.

    `offer` is told of a worker after each look at it; `held` answers how many of its slots are held by whoever this
    process shares them with. Without an answer to that there are no strangers.
    """

    def __init__(
        self,
        registry: Registry,
        settings: Health,
        clock: Callable[[], float] = time.monotonic,
        *,
        offer: Callable[[Worker], None] = lambda worker: None,
        held: Callable[[str], int] | None = None,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._offer = offer
        self._held = held
        self._due: dict[str, asyncio.Event] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._is_running = False
        registry.listen(self._look_again)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._is_running = True
        self._registry.follow(self)
        try:
            yield
        finally:
            self._is_running = False
            for worker_id in list(self._watches):
                self._end(worker_id)
            await asyncio.gather(*self._ending, return_exceptions=True)

    def joined(self, worker: Worker) -> None:
        """Watch it, by the address that it has now."""
        self._end(worker.id)
        if self._is_running:
            self._due[worker.id] = asyncio.Event()
            self._watches[worker.id] = asyncio.create_task(self._watch_over(worker))

    def left(self, worker: Worker) -> None:
        self._end(worker.id)

    def forgotten(self, worker: Worker) -> None:
        """Nothing is left of it here."""

    def _end(self, worker_id: str) -> None:
        self._due.pop(worker_id, None)
        watch = self._watches.pop(worker_id, None)
        if watch is not None:
            self._ending.add(watch)
            watch.add_done_callback(self._ending.discard)
            watch.cancel()

    def _look_again(self, worker: Worker) -> None:
        """A state changed somewhere else (a request failed): do not wait for the next round."""
        if due := self._due.get(worker.id):
            due.set()

    async def _watch_over(self, worker: Worker) -> None:
        async with _client(worker.address, self._settings.probe_timeout_s) as client:
            await self._watch(client, worker)

    async def _watch(self, client: httpx.AsyncClient, worker: Worker) -> None:
        due = self._due[worker.id]
        while True:
            due.clear()
            self._change(worker, transitions.elapsed(worker.condition, self._clock()))
            await self._round(client, worker)
            self._registry.fade(worker)
            self._offer(worker)
            try:
                async with asyncio.timeout(self._pause_s(worker)):
                    await due.wait()
            except TimeoutError:
                continue

    def _pause_s(self, worker: Worker) -> float:
        """Until the next look: sooner where something is about to change."""
        interval, now = self._settings.probe_interval_s, self._clock()
        condition = worker.condition
        if now < condition.until:
            return min(interval, condition.until - now)
        if is_ramping(condition, now, self._settings.slow_start_s):
            return min(interval, self._settings.slow_start_s / RAMP_STEPS)
        return interval if condition.serves else min(interval, RETURN_INTERVAL_S)

    async def _round(self, client: httpx.AsyncClient, worker: Worker) -> None:
        """One look at one worker. Never raises: whatever a worker answers, it is watched on."""
        try:
            await self._probe(client, worker)
            await self._read_load(client, worker)
            if worker.condition.state is State.UNPROVEN:
                await self._prove(client, worker)
            elif self._is_silent(worker):
                await self._suspect(client, worker)
        except NotProven as error:
            self._change(worker, transitions.unproven(worker.condition, str(error)))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._unanswered(worker, error)

    def _unanswered(self, worker: Worker, error: Exception) -> None:
        reason = (str(error) or type(error).__name__)[:REASON_CHARS]
        distrust = tls_failure(error) or _hung_up(worker, error)
        if distrust is not None:
            # Something listens, so nothing died there; it is not what the configuration says, so it gets no work.
            self._change(worker, transitions.unproven(worker.condition, distrust[:REASON_CHARS]))
        elif isinstance(error, httpx.ConnectError):
            self._change(worker, transitions.refused(worker.condition, reason))
        else:
            worker.load = None
            self._change(worker, transitions.missed(worker.condition, reason, self._settings.probe_misses))

    def _change(self, worker: Worker, condition: transitions.Condition) -> None:
        self._registry.change(worker, condition)
        if due := self._due.get(worker.id):
            due.clear()

    def _is_silent(self, worker: Worker) -> bool:
        """Whether it holds work of ours and nothing was heard of its engine for too long."""
        silent_s = self._clock() - worker.progress.heard
        return worker.condition.serves and worker.in_flight > 0 and silent_s >= self._settings.progress_timeout_s

    async def _suspect(self, client: httpx.AsyncClient, worker: Worker) -> None:
        """Ask a silent worker for one token: `/health` stays 200 while an engine hangs, and so do its connections."""
        try:
            await self._canary(client, worker, self._settings.progress_canary_timeout_s)
        except NotProven as error:
            self._change(worker, transitions.stalled(worker.condition, f"silent; {error}"[:REASON_CHARS]))
        else:
            worker.progress.heard = self._clock()

    async def _probe(self, client: httpx.AsyncClient, worker: Worker) -> None:
        response = await client.get("/health")
        response.raise_for_status()
        self._change(worker, transitions.probed(worker.condition))

    async def _prove(self, client: httpx.AsyncClient, worker: Worker) -> None:
        """Ready means: serves the model we think it serves, and has just generated a token of it."""
        served = worker.address.served_model
        models = await client.get("/v1/models")
        entries = [entry for entry in _list(_object(models).get("data")) if isinstance(entry, dict)]
        mine = next((entry for entry in entries if entry.get("id") == served), None)
        if mine is None:
            names = ", ".join(str(entry.get("id")) for entry in entries)
            raise NotProven(f"serves {names or 'nothing'}, not {served}"[:REASON_CHARS])
        length = mine.get("max_model_len")
        worker.context_length = length if isinstance(length, int) else None
        self._registry.doubt(worker, doubt_about(await _version(client)))
        await self._canary(client, worker, self._settings.canary_timeout_s)
        self._change(worker, transitions.proven(worker.condition, self._clock()))

    async def _canary(self, client: httpx.AsyncClient, worker: Worker, timeout_s: float) -> None:
        """Have the worker generate one token. Raises NotProven; httpx.HTTPError when it cannot be reached."""
        for route, fields in CANARIES:
            body = {"model": worker.address.served_model, **fields}
            try:
                response = await client.post(route, json=body, timeout=timeout_s)
            except httpx.ReadTimeout:
                raise NotProven(f"one token asked, none came within {timeout_s:g} s") from None
            if response.status_code != httpx.codes.NOT_FOUND:
                break
        if response.status_code != httpx.codes.OK:
            raise NotProven(f"one token asked, answered {response.status_code}: {_message(response)}"[:REASON_CHARS])

    async def _read_load(self, client: httpx.AsyncClient, worker: Worker) -> None:
        """Load is advice: a worker without readable metrics is served by our own counts, and stays as it is."""
        before, held = worker.load, self._held_on(worker)
        try:
            async with (
                asyncio.timeout(self._settings.probe_timeout_s),
                client.stream("GET", "/metrics") as response,
            ):
                text = await _bounded_text(response, METRICS_MAX_BYTES)
            worker.load = parse_engine_load(text, self._clock()) if response.is_success else None
        except (httpx.HTTPError, TimeoutError):
            worker.load = None
        if before is not None and worker.load is not None and worker.load.generated > before.generated:
            worker.progress.heard = self._clock()
        # What was granted or given back meanwhile is counted as ours: only certain strangers take room away.
        if self._held is not None:
            worker.strangers = strangers_in(worker, max(held, self._held_on(worker)))

    def _held_on(self, worker: Worker) -> int:
        return max(worker.in_flight, self._held(worker.id) if self._held is not None else 0)


def _client(address: WorkerAddress, timeout_s: float) -> httpx.AsyncClient:
    """A client of this worker alone: its certificates and its key are never shown to another server."""
    # A context that trusts nobody: from a plain address nothing leads to TLS that was not asked for.
    context = address.tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    headers = {"authorization": f"Bearer {address.api_key}"} if address.api_key else {}
    client = httpx.AsyncClient(
        base_url=address.url, verify=context, headers=headers, timeout=timeout_s, trust_env=False
    )
    if address.server_name is not None:
        client.event_hooks["request"] = [_naming(address.server_name)]
    return client


def _hung_up(worker: Worker, error: Exception) -> str | None:
    """In TLS 1.3 a server judges its client after the handshake, and many say nothing when they hang up."""
    hung_up = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError)  # by how soon it did
    if worker.address.tls is None or worker.condition.serves or not hung_up:
        return None
    return "TLS: hung up after the handshake; it may want another client certificate"


def _naming(server_name: str) -> Callable[[httpx.Request], Awaitable[None]]:
    async def name(request: httpx.Request) -> None:
        request.extensions["sni_hostname"] = server_name

    return name


async def _bounded_text(response: httpx.Response, limit_bytes: int) -> str:
    """The body; nothing of one that is longer than `limit_bytes`, and its rest is never read."""
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > limit_bytes:
            return ""
    return body.decode("utf-8", "replace")


async def _version(client: httpx.AsyncClient) -> object:
    """What the worker says it is; anything or nothing, since no work depends on it."""
    response = await client.get("/version")
    try:
        return _object(response).get("version")
    except (NotProven, httpx.HTTPStatusError):
        return None


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
