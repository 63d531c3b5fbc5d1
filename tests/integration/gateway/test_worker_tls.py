"""TLS to workers: those whose certificates hold are served from, all others are never ready and say why in one line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.certificates import Authority
from tests.fakes.reading import events
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, until
from tests.integration.gateway.wire import connected

pytestmark = pytest.mark.asyncio(loop_scope="session")

HERE = "127.0.0.1"
WORKER_KEY = "worker-canary-5f2c"
CLIENT_KEY = "client-canary-91ab"

HUNG_UP = "TLS: hung up after the handshake; it may want another client certificate"
# Why each of these is never ready: what OpenSSL says, in the words that an operator reads.
REFUSED = {
    "foreign": "TLS: unable to get local issuer certificate",
    "expired": "TLS: certificate has expired",
    "misnamed": "TLS: IP address mismatch, certificate is not valid for '127.0.0.1'.",
    "uninvited": HUNG_UP,
    "imposter": HUNG_UP,
    "old": "TLS: unexpected eof while reading",
    "plain": "TLS: wrong version number",
}
HASTY: dict[str, Any] = {"admission": {"no_worker_timeout_s": 0.2}}
SERVED = ("trusted", "named", "chained", "mutual")


class Yard:
    """One gateway, and a model for each way in which a worker may be certified."""

    def __init__(self, directory: Path) -> None:
        ours, theirs = Authority(directory / "ours"), Authority(directory / "theirs")
        self.workers = {
            name: FakeWorker(name, tls=context)
            for name, context in {
                "trusted": ours.server(HERE),
                "named": ours.server("worker.internal"),
                "chained": ours.server("anything.internal"),
                "mutual": ours.strict_server(HERE),
                "foreign": theirs.server(HERE),
                "expired": ours.server(HERE, expired=True),
                "misnamed": ours.server("other.internal"),
                "uninvited": ours.strict_server(HERE),
                "imposter": ours.strict_server(HERE),
                "old": ours.old_server(HERE),
                "plain": None,
            }.items()
        }
        extra = {
            "named": {"server_name": "worker.internal"},
            "chained": {"verify": "chain"},
            "mutual": ours.client(),
            "imposter": theirs.client("imposter.internal"),
        }
        self.direct = ours.trust(ours.client("direct.internal"))
        self.key_file = directory / "worker.key"
        self.key_file.write_text(WORKER_KEY + "\n")
        self.tls = {name: {"ca_file": str(ours.ca_file), **extra.get(name, {})} for name in self.workers}
        self.gateway: GatewayProcess

    def models(self) -> list[dict[str, Any]]:
        return [self._model(name, worker) for name, worker in self.workers.items()]

    def _model(self, name: str, worker: FakeWorker) -> dict[str, Any]:
        listed: dict[str, Any] = {"url": f"https://{HERE}:{worker.port}", "served_model": name, "tls": self.tls[name]}
        if name in ("trusted", "foreign"):
            listed["api_key_file"] = str(self.key_file)
        return {"name": name, "variants": [{"name": "v", "workers": [listed]}]}

    async def reason(self, name: str) -> str:
        report = await self.gateway.workers()
        return report[f"{HERE}:{self.workers[name].port}"]["reason"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def yard(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Yard]:
    yard = Yard(tmp_path_factory.mktemp("yard"))
    async with AsyncExitStack() as stack:
        for worker in yard.workers.values():
            await stack.enter_async_context(worker)
        gateway = GatewayProcess(tmp_path_factory.mktemp("tls"), yard.models(), logs={"level": "debug"}, **HASTY)
        yard.gateway = await stack.enter_async_context(gateway)
        yield yard


@pytest.mark.parametrize("name", SERVED)
async def test_a_certified_worker_serves(yard: Yard, name: str) -> None:
    await yard.gateway.ready(yard.workers[name])
    answer = await yard.gateway.http.post(CHAT, json=chat(model=name))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("name", REFUSED)
async def test_any_other_is_never_ready(yard: Yard, name: str) -> None:
    """It is told apart from a dead one, no request reaches it, and its key is not shown to it."""

    async def is_told() -> bool:
        return await yard.reason(name) != "not probed yet"

    await until(is_told, name)
    assert await yard.reason(name) == REFUSED[name]
    assert await yard.gateway.state_of(yard.workers[name]) == "unproven"
    refused = await yard.gateway.http.post(CHAT, json=chat(model=name))
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "no_healthy_worker"
    assert yard.workers[name].requests == []
    assert yard.workers[name].probes == {}


@pytest.mark.parametrize("fault", ["", "one_byte_chunks"])
async def test_a_stream_over_tls_is_whole(yard: Yard, fault: str) -> None:
    """Poured, in parts that no TLS record fits: every token that the worker made, once and in order."""
    worker = yard.workers["mutual"]
    await yard.gateway.ready(worker)
    tokens = 40 if fault else 1000
    body = chat(model="mutual", stream=True, max_tokens=tokens, ignore_eos=True, x_fault=fault)
    answer = await yard.gateway.http.post(CHAT, json=body)
    told = [event.data for event in events(answer.content)]
    assert told[-1] == "[DONE]"
    async with httpx.AsyncClient(verify=yard.direct, timeout=30) as client:
        direct = await client.post(f"{worker.url}{CHAT}", json=body)
    assert text_of(told) == text_of([event.data for event in events(direct.content)])


def text_of(told: list[str]) -> list[str]:
    deltas = [json.loads(data)["choices"][0]["delta"] for data in told[:-1]]
    return [delta["content"] for delta in deltas if delta.get("content")]


async def test_a_client_that_leaves_frees_the_worker(yard: Yard) -> None:
    worker = yard.workers["mutual"]
    await yard.gateway.ready(worker)
    before = worker.counts.aborted
    body = chat(model="mutual", stream=True, x_fault="hang_after:2")
    async with yard.gateway.http.stream("POST", CHAT, json=body) as stream:
        await anext(stream.aiter_bytes())
    await worker.aborted(before + 1)
    await yard.gateway.idle()


async def test_a_worker_that_dies_under_tls_is_lost_honestly(yard: Yard) -> None:
    worker = yard.workers["chained"]
    await yard.gateway.ready(worker)
    body = chat(model="chained", stream=True, x_fault="die_after:3")
    async with connected(yard.gateway.url) as wire:
        await wire.post(CHAT, body)
        told = await wire.rest()
    assert b"worker_lost" in told
    assert b"[DONE]" not in told
    assert not told.endswith(b"0\r\n\r\n")


async def test_the_workers_key_and_the_clients_never_meet(yard: Yard) -> None:
    """S16 and S33: each is sent where it belongs and shown nowhere else: answers, pages, logs, the process list."""
    worker, gateway = yard.workers["trusted"], yard.gateway
    await gateway.ready(worker)
    headers = {"authorization": f"Bearer {CLIENT_KEY}", "x-api-key": CLIENT_KEY}
    answer = await gateway.http.post(CHAT, json=chat(model="trusted"), headers=headers)
    broken = await gateway.http.post(CHAT, json=chat(model="trusted", x_fault="html200"), headers=headers)
    assert (answer.status_code, broken.status_code) == (200, 502)
    # The first request of all is the monitor's, the last the client's: both are the gateway's towards the worker.
    for received in (worker.requests[0], worker.requests[-1]):
        assert received.headers["authorization"] == f"Bearer {WORKER_KEY}"
        assert CLIENT_KEY not in str(received.headers)
    pages = [await gateway.http.get(path) for path in ("/readyz", "/metrics", "/v1/models", "/openapi.json")]
    shown = [f"{page.headers}{page.text}" for page in (answer, broken, *pages)]
    listed = await asyncio.to_thread(Path(f"/proc/{gateway.process.pid}/cmdline").read_text)
    for text in (*shown, listed, gateway.process.output):
        assert WORKER_KEY not in text
        assert CLIENT_KEY not in text
    plain = yard.workers["named"]
    await gateway.ready(plain)
    await gateway.http.post(CHAT, json=chat(model="named"), headers=headers)
    assert "authorization" not in plain.requests[-1].headers
