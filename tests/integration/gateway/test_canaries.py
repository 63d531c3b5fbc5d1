"""What people say, and the keys they say it with, is found nowhere but in the answers to them (S9, S16, S26, S33).

Canaries are planted in every place that a client can write to, a gateway that logs all it can is led through good ends
and bad ones, and then everything that it leaves behind is searched.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.collector import Collector
from tests.integration.gateway.running import GatewayProcess, issue_keys, model
from tests.processes import Process, Valkey

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = "canaryprompt6f1d"
USER = "canaryuser83b0"
HEADER = "canaryheader27ce"
WRONG_KEY = "canarywrongkey95aa"
SECRET = "canarysecret40e2-of-the-server"
TRACE = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": f"a={HEADER}"}
PLANTED = (PROMPT, USER, HEADER, WRONG_KEY, SECRET)


async def plant(gateway: GatewayProcess, worker: FakeWorker, key: str) -> None:
    """Good ends and bad ones, each with canaries in prompt, fields, headers and path. What is said comes back."""
    headers = {"cookie": HEADER, "x-anything": HEADER, "referer": HEADER, **TRACE}

    async def ask(**fields: Any) -> httpx.Response:
        body = {**chat(PROMPT, user=USER, metadata={"note": USER}), "x_note": USER, **fields}
        return await gateway.http.post(CHAT, json=body, headers=headers)

    told = await ask()
    assert PROMPT in told.text
    assert PROMPT in (await ask(stream=True)).text
    for refused in ({"temperature": PROMPT}, {"stop": {PROMPT: 1}}, {"chat_template": PROMPT}, {"model": PROMPT}):
        assert (await ask(**refused)).is_client_error
    for fault in ("die_before_byte", "die_after:2", "fast_500", "html200", "garbage", "error_event:2", "half_event"):
        for stream in (False, True):
            try:
                answer = await ask(stream=stream, x_fault=fault)
                assert answer.is_server_error or stream
                assert answer.is_success or PROMPT not in answer.text
            except httpx.RemoteProtocolError:
                assert stream
        worker.heal()
        await gateway.ready(worker)
    for content in (b'{"model": "%b' % PROMPT.encode(), b"\xff" + PROMPT.encode(), b'{"%b": 1e999}' % PROMPT.encode()):
        answer = await gateway.http.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400
    for wrong in (f"Bearer {WRONG_KEY}", f"Basic {WRONG_KEY}", WRONG_KEY):
        assert (await gateway.http.get("/v1/models", headers={"authorization": wrong})).status_code == 401
    assert (await gateway.http.get(f"/v1/models?api_key={WRONG_KEY}")).status_code == 200
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(f"GET /{PROMPT} HTTP/9.9\r\nauthorization: Bearer {WRONG_KEY}\r\n\r\n".encode())
    assert b" 400 " in await reader.readline()
    writer.close()


@asynccontextmanager
async def held(gateway: GatewayProcess, worker: FakeWorker) -> AsyncIterator[None]:
    """While one request runs and others wait; then their clients leave."""
    worker.inject("hang_before")
    asks = [asyncio.create_task(gateway.http.post(CHAT, json=chat(PROMPT, user=USER))) for _ in range(3)]
    await gateway.metric("sluice_queue_depth", 1)
    yield
    for ask in asks:
        ask.cancel()
    await asyncio.gather(*asks, return_exceptions=True)
    worker.heal()


def dump(server: Valkey) -> str:
    """Everything in Redis, as values rather than as compressed dumps."""
    reads: dict[bytes, Any] = {}
    with redis.Redis.from_url(server.url) as client:
        for name in client.scan_iter():
            kind = client.type(name).decode()
            read = {
                "string": client.get,
                "hash": client.hgetall,
                "set": client.smembers,
                "zset": lambda key: client.zrange(key, 0, -1, withscores=True),
                "list": lambda key: client.lrange(key, 0, -1),
            }[kind]
            reads[name] = read(name)
    assert reads
    return repr(reads)


async def pages(gateway: GatewayProcess) -> str:
    found = [await gateway.operators.get(path) for path in
             ("/metrics", "/admin/queue", "/admin/keys", "/admin/tenants", "/openapi.json", "/readyz")]  # fmt: skip
    assert all(page.is_success for page in found)
    return "\n".join(page.text for page in found)


def command_lines(process: Process) -> str:
    return " ".join(" ".join(child.cmdline()) for child in [psutil.Process(process.pid)])


async def test_canaries_are_found_nowhere(tmp_path: Path, own_valkey: Valkey) -> None:
    file, secret = tmp_path / "keys.yaml", tmp_path / "secret"
    secret.write_text(SECRET)
    keys = await issue_keys(file, "acme", admin="operators", secret=SECRET)
    async with FakeWorker("m") as worker, Collector() as collector:
        async with GatewayProcess(
            tmp_path,
            [model("m", worker, max_concurrency=2)],
            key=keys["acme"],
            admin_key=keys["operators"],
            admin=True,
            auth={"enabled": True, "key_files": [str(file)], "secret_file": str(secret)},
            redis={"url": own_valkey.url},
            logs={"level": "debug", "requests": "all"},
            tracing={"endpoint": collector.url, "flush_timeout_s": 20},
        ) as gateway:
            await gateway.ready(worker)
            made = (await gateway.operators.post("/admin/keys", json={"tenant": "acme"})).json()["key"]
            await plant(gateway, worker, keys["acme"])
            async with held(gateway, worker):
                left = dump(own_valkey) + await pages(gateway)
            await gateway.idle()
            left += dump(own_valkey) + await pages(gateway) + command_lines(gateway.process)
            last = await gateway.operators.delete("/admin/keys/thelastline")
            assert last.status_code == 404
            await asyncio.to_thread(gateway.process.wait_for_line, "thelastline")
            log = gateway.process.output
    assert '"event": "request"' in log
    assert all(json.loads(line) for line in log.splitlines() if line.startswith("{"))
    assert len(collector.spans) > 100
    left += repr(collector.raw) + repr(collector.headers)
    left += log + file.read_text() + gateway.process.output
    for canary in (*PLANTED, keys["acme"][10:], keys["operators"][10:], made[10:]):
        assert canary not in left
    assert SECRET not in os.environ.values()
