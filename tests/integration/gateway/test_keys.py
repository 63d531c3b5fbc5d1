"""Keys at a running gateway: who gets in, where, as whom, and for how long."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from app.inference import cache_salt
from app.tenancy.directory import REFRESH_S
from tests.fakes.engine import Timing
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, MESSAGES, chat
from tests.integration.gateway.running import PATIENCE_S, GatewayProcess, issue_keys, model, until
from tests.processes import Valkey

pytestmark = pytest.mark.asyncio(loop_scope="session")

SECRET = "a secret of this test"
ADMIN_PATHS = ["/metrics", "/docs", "/openapi.json", "/admin/queue", "/admin/keys", "/admin/tenants"]
TENANTS = [
    {"name": "narrow", "models": ["m"], "ceiling": "default", "max_tokens": 8},
    {"name": "trusted", "engine_fields": True},
]


@dataclass
class Guarded:
    """A gateway that asks for keys, with a listener for operators; `keys` by tenant."""

    gateway: GatewayProcess
    worker: FakeWorker
    keys: dict[str, str]

    def ask(self, tenant: str, **fields: Any) -> Any:
        return self.gateway.http.post(CHAT, json=chat(**fields), headers=bearer(self.keys[tenant]))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    file = directory / "keys.yaml"
    keys = await issue_keys(file, "acme", "narrow", "trusted", admin="operators", secret=SECRET)
    async with FakeWorker("m") as worker, FakeWorker("other") as other:
        async with GatewayProcess(
            directory,
            [model("m", worker), model("other", other)],
            admin=True,
            key=keys["acme"],
            admin_key=keys["operators"],
            auth={"enabled": True, "key_files": [str(file)], "secret": SECRET, "failures_per_min": 100_000},
            tenants=TENANTS,
        ) as gateway:
            await gateway.ready(worker, other)
            yield Guarded(gateway, worker, keys)


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "api-key"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_key_gets_in_however_clients_send_it(guarded: Guarded, name: str, path: str) -> None:
    key = guarded.keys["acme"]
    headers = {name: f"Bearer {key}" if name == "authorization" else key}
    async with httpx.AsyncClient(base_url=guarded.gateway.url, timeout=30) as http:
        answer = await http.post(path, json=chat(max_tokens=4), headers=headers)
    assert answer.status_code == 200, answer.text
    got = guarded.worker.requests[-1]
    assert not {name, "authorization", "x-api-key"} & set(got.headers)
    assert key not in json.dumps(got.body)


async def wrong(guarded: Guarded) -> list[tuple[bytes, bytes]]:
    """B61: every way not to have a key, at several routes; heads, without ids and dates, and bodies of the answers."""
    key = guarded.keys["acme"].encode()
    bearer = b"authorization: Bearer "
    attempts = [
        b"",
        b"authorization: Basic " + key,
        b"authorization:",
        bearer,
        b"authorization: " + key,
        bearer + key + b"\r\n" + bearer + key[:-1] + b"!",
        bearer + b"k" * 8192,
        bearer + b"' OR '1'='1",
        bearer + "schlüssel".encode(),
        bearer + key[:-1],
        bearer + key + b"x",
        bearer + key.upper(),
        b"x-api-key: " + key + b"\r\napi-key: another",
    ]
    found = [await told(guarded, b"POST " + CHAT.encode(), header, json.dumps(chat()).encode()) for header in attempts]
    paths = (b"/v1/models", b"/v1/models/m", b"/nowhere", b"/v1/files")
    return found + [await told(guarded, b"GET " + path, b"", b"") for path in paths]


async def told(guarded: Guarded, asked: bytes, header: bytes, body: bytes) -> tuple[bytes, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", guarded.gateway.port)
    head = b"%b HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n" % asked
    head += (header + b"\r\n" if header else b"") + b"content-length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    answer = await reader.read()
    writer.close()
    lines, _, text = answer.partition(b"\r\n\r\n")
    kept = [line for line in lines.split(b"\r\n") if not line.startswith((b"x-request-id", b"date"))]
    return b"\n".join(kept), text


async def test_b61_without_a_key_everybody_hears_the_same(guarded: Guarded) -> None:
    seen = guarded.worker.counts.seen
    answers = await wrong(guarded)
    ((head, body),) = set(answers)
    assert head.startswith(b"HTTP/1.1 401 ")
    assert b"\nwww-authenticate: Bearer" in head
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert guarded.worker.counts.seen == seen


async def test_b61_no_part_of_a_key_is_logged(guarded: Guarded) -> None:
    await wrong(guarded)
    await guarded.ask("acme")
    log = await logged(guarded.gateway)
    for key in guarded.keys.values():
        assert key[10:30] not in log
    assert "schl" not in log
    assert "kkkkkkkk" not in log


async def test_b61_a_nul_in_a_key_is_no_http(guarded: Guarded) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", guarded.gateway.port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer a\0b\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
    writer.close()


async def test_b64_a_key_says_who_asks_and_no_header_does(guarded: Guarded) -> None:
    private = {"x-sluice-tenant": "trusted", "x-tenant": "trusted", "x-priority": "0", "x-sluice-band": "priority"}
    headers = {**bearer(guarded.keys["narrow"]), **private}
    answer = await guarded.gateway.http.post(CHAT, json=chat(), headers=headers)
    assert answer.status_code == 200
    salt = guarded.worker.requests[-1].body["cache_salt"]
    assert (await guarded.ask("narrow")).status_code == 200
    assert salt == guarded.worker.requests[-1].body["cache_salt"]


@pytest.mark.parametrize("path", ADMIN_PATHS)
async def test_b65_what_is_the_operators(guarded: Guarded, path: str) -> None:
    gateway, tenant = guarded.gateway, bearer(guarded.keys["acme"])
    for key in ("", guarded.keys["acme"], guarded.keys["operators"]):
        hidden = await gateway.http.get(path, headers=bearer(key) if key else {"authorization": "x"})
        assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "not_found")
    refused = await gateway.operators.get(path, headers=tenant)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
    nobody = await gateway.operators.get(path, headers={"authorization": "x"})
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await gateway.operators.get(path)).status_code == 200


async def test_probes_ask_for_no_key(guarded: Guarded) -> None:
    for port in (guarded.gateway.port, guarded.gateway.admin_port):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.get("/readyz")).status_code == 200


async def test_b58_what_a_tenant_may_not_use_does_not_exist_for_it(guarded: Guarded) -> None:
    forbidden = await guarded.ask("narrow", model="other")
    unknown = await guarded.ask("narrow", model="othen")
    assert forbidden.status_code == unknown.status_code == 404
    assert forbidden.content == unknown.content.replace(b"othen", b"other")
    assert (await guarded.ask("acme", model="other")).status_code == 200
    listed = await guarded.gateway.http.get("/v1/models", headers=bearer(guarded.keys["narrow"]))
    assert [entry["id"] for entry in listed.json()["data"]] == ["m", "m:v"]
    one = await guarded.gateway.http.get("/v1/models/other", headers=bearer(guarded.keys["narrow"]))
    assert (one.status_code, one.json()["error"]["code"]) == (404, "model_not_found")
    everything = await guarded.gateway.http.get("/v1/models")
    assert [entry["id"] for entry in everything.json()["data"]] == ["m", "m:v", "other", "other:v"]


async def test_a_tenants_terms_hold(guarded: Guarded) -> None:
    too_many = await guarded.ask("narrow", max_tokens=9)
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "max_tokens")
    assert (await guarded.ask("narrow")).status_code == 200
    assert guarded.worker.requests[-1].body["max_completion_tokens"] == 8
    refused = await guarded.ask("acme", kv_transfer_params={"x": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert (await guarded.ask("trusted", kv_transfer_params={"x": 1})).status_code == 200
    assert guarded.worker.requests[-1].body["kv_transfer_params"] == {"x": 1}


async def test_a_band_above_the_ceiling_is_lowered(guarded: Guarded) -> None:
    before = await guarded.gateway.scrape()
    for tenant in ("narrow", "acme"):
        assert (await guarded.ask(tenant, service_tier="priority")).status_code == 200
    after = await guarded.gateway.scrape()
    by_band = {
        band: after.sum("sluice_requests_total", band=band) - before.sum("sluice_requests_total", band=band)
        for band in ("priority", "default")
    }
    assert by_band == {"priority": 1, "default": 1}


async def test_each_tenant_has_a_cache_of_its_own(guarded: Guarded) -> None:
    salts = []
    for fields in ({}, {"cache_salt": "x"}):
        for tenant in ("acme", "narrow"):
            assert (await guarded.ask(tenant, **fields)).status_code == 200
            salts.append(guarded.worker.requests[-1].body["cache_salt"])
    assert len(set(salts)) == 4
    assert cache_salt(b"", "acme") not in salts
    assert (await guarded.ask("acme")).status_code == 200
    assert guarded.worker.requests[-1].body["cache_salt"] == salts[0]


async def test_what_a_tenant_uses_is_counted_for_it_or_for_the_others(guarded: Guarded) -> None:
    before = await guarded.gateway.scrape()
    for tenant in ("narrow", "narrow", "acme"):
        assert (await guarded.ask(tenant)).status_code == 200
    after = await guarded.gateway.scrape()
    for tenant, count in (("narrow", 2), ("other", 1), ("acme", 0)):
        for name in ("sluice_tenant_requests_total", "sluice_tenant_tokens_total"):
            grown = after.sum(name, tenant=tenant) - before.sum(name, tenant=tenant)
            assert (grown == count) if name.endswith("requests_total") else (grown > 0) is (count > 0)


async def test_every_admin_action_is_in_the_log(guarded: Guarded) -> None:
    await guarded.gateway.operators.get("/admin/keys?audited=1")
    await guarded.gateway.operators.get("/admin/keys", headers=bearer(guarded.keys["acme"]))
    made = await guarded.gateway.operators.post("/admin/keys", json={"tenant": "x"})
    assert made.status_code == 405
    assert made.json()["error"]["code"] == "method_not_allowed"
    log = await logged(guarded.gateway)
    lines = [json.loads(line) for line in log.splitlines() if '"event": "admin"' in line]
    told = [(line["action"], line["status"], line["by_tenant"], line["by_hint"]) for line in lines[-4:-1]]
    hints = {tenant: key[-4:] for tenant, key in guarded.keys.items()}
    assert told == [
        ("GET /admin/keys", 200, "operators", hints["operators"]),
        ("GET /admin/keys", 403, "acme", hints["acme"]),
        ("POST /admin/keys", 405, "operators", hints["operators"]),
    ]


async def test_what_operators_see_of_keys_opens_nothing(guarded: Guarded) -> None:
    page = await guarded.gateway.operators.get("/admin/keys")
    rows = page.json()["data"]
    assert [row["tenant"] for row in rows] == ["acme", "narrow", "trusted", "operators"] or len(rows) == 4
    for key in guarded.keys.values():
        assert key[10:30] not in page.text
    assert "digest" not in page.text
    tenants = (await guarded.gateway.operators.get("/admin/tenants")).json()["data"]
    assert {row["name"]: (row["keys"], row["max_tokens"]) for row in tenants}["narrow"] == (1, 8)
    assert "salt" not in json.dumps(tenants)


# Failures


async def test_s11_an_address_that_keeps_failing_is_told_to_wait_and_good_keys_still_work(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    keys = await issue_keys(file, "acme", admin="operators")
    auth = {"enabled": True, "key_files": [str(file)], "failures_per_min": 3}
    async with FakeWorker("m") as worker:
        async with GatewayProcess(
            tmp_path, [model("m", worker)], key=keys["acme"], admin_key=keys["operators"], auth=auth
        ) as gateway:
            await gateway.ready(worker)
            answers = [await gateway.http.get("/v1/models", headers=bearer("wrong")) for _ in range(5)]
            assert [answer.status_code for answer in answers] == [401, 401, 401, 429, 429]
            assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
            assert (await gateway.http.get("/v1/models")).status_code == 200
            assert (await gateway.scrape()).sum("sluice_auth_failures_total", reason="unknown") == 5


# Changes


async def test_a_key_file_that_changes_is_read_again_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    keys = await issue_keys(file, "acme", admin="operators")
    auth = {"enabled": True, "key_files": [str(file)]}
    async with FakeWorker("m") as worker:
        async with GatewayProcess(
            tmp_path, [model("m", worker)], key=keys["acme"], admin_key=keys["operators"], auth=auth
        ) as gateway:
            late = (await issue_keys(file, "late"))["late"]
            await becomes(gateway, late, 200)
            file.write_text("keys: [{digest: x}]")
            await asyncio.to_thread(gateway.process.wait_for_line, "keys cannot be read")
            assert await status(gateway, late) == 200
            file.write_text("keys: []")
            await becomes(gateway, late, 401)


async def test_keys_in_redis_are_made_used_rotated_and_ended_on_all_replicas(
    tmp_path: Path, own_valkey: Valkey
) -> None:
    file = tmp_path / "keys.yaml"
    keys = await issue_keys(file, admin="operators", secret=SECRET)
    shared: dict[str, Any] = {
        "auth": {"enabled": True, "key_files": [str(file)], "secret": SECRET},
        "redis": {"url": own_valkey.url},
        "admission": {"replicas": 2},
    }
    (tmp_path / "two").mkdir()
    key = keys["operators"]
    async with FakeWorker("m") as worker:
        async with (
            GatewayProcess(tmp_path, [model("m", worker)], admin=True, admin_key=key, **shared) as one,
            GatewayProcess(tmp_path / "two", [model("m", worker)], admin=True, admin_key=key, **shared) as two,
        ):
            made = (await one.operators.post("/admin/keys", json={"tenant": "acme", "expires_s": 3600})).json()
            assert await status(one, made["key"]) == 200
            assert REFRESH_S <= 0.5  # all is known everywhere within a second
            await becomes(two, made["key"], 200)

            renewed = (await two.operators.post(f"/admin/keys/{made['id']}/rotate", json={"overlap_s": 600})).json()
            assert (renewed["tenant"], await status(two, made["key"])) == ("acme", 200)
            await becomes(one, renewed["key"], 200)

            ended = await two.operators.delete(f"/admin/keys/{made['id']}")
            assert (ended.status_code, ended.json()["is_valid"]) == (200, False)
            assert await status(two, made["key"]) == 401
            await becomes(one, made["key"], 401)
            assert await status(one, renewed["key"]) == 200

            rows = (await one.operators.get("/admin/keys")).json()["data"]
            assert {(row["id"], row["store"], row["is_valid"]) for row in rows if row["tenant"] == "acme"} == {
                (made["id"], "redis", False),
                (renewed["id"], "redis", True),
            }
            missing = await one.operators.delete("/admin/keys/key_0000000000000000")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")

            # Redis gone: who was known goes on, and nothing can be changed.
            await asyncio.to_thread(own_valkey.kill)
            assert await status(one, renewed["key"]) == 200
            assert await status(one, "sk-sluice-unknown") == 401
            unmade = await one.operators.post("/admin/keys", json={"tenant": "acme"})
            assert (unmade.status_code, unmade.json()["error"]["code"]) == (503, "dependency_unavailable")

            # Back, and empty: keys that nobody revoked still work, and the next change is heard.
            await asyncio.to_thread(own_valkey.start)
            await until_made(one, "late")
            assert await status(two, key) == 200

            log = await logged(one)
            assert '"action": "POST /admin/keys"' in log
            assert f'"of_key": "{made["id"]}"' in log
            for text in (made["key"], renewed["key"]):
                assert text[10:30] not in log + two.process.output


async def test_an_expired_key_is_none(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    keys = await issue_keys(file, "short", admin="operators", lifetime_s=2)
    auth = {"enabled": True, "key_files": [str(file)]}
    async with FakeWorker("m") as worker:
        async with GatewayProcess(tmp_path, [model("m", worker)], key=keys["short"], auth=auth) as gateway:
            await becomes(gateway, keys["short"], 401)


@dataclass
class Streamed:
    """What a client has heard of a stream."""

    status: int = 0
    text: str = ""

    async def read(self, gateway: GatewayProcess, key: str, **fields: Any) -> None:
        """Until it ends, however it does."""
        body = chat(stream=True, ignore_eos=True, **fields)
        async with gateway.http.stream("POST", CHAT, json=body, headers=bearer(key)) as answer:
            self.status = answer.status_code
            with suppress(httpx.RemoteProtocolError):
                async for text in answer.aiter_text():
                    self.text += text

    @property
    def last_event(self) -> str:
        return self.text.strip().rpartition("data: ")[2]


async def test_a_revoked_key_ends_what_it_began_on_all_replicas(tmp_path: Path, valkey: Valkey) -> None:
    """Streams end in an error event, who waits is told 401; another tenant's request goes on."""
    file = tmp_path / "keys.yaml"
    keys = await issue_keys(file, "other", admin="operators", secret=SECRET)
    shared: dict[str, Any] = {
        "auth": {"enabled": True, "key_files": [str(file)], "secret": SECRET},
        "redis": {"url": valkey.url},
        "admission": {"replicas": 2},
        "admin_key": keys["operators"],
    }
    (tmp_path / "two").mkdir()
    async with FakeWorker("m") as worker:
        worker.timing = Timing(decode_s=0.05)
        models = [model("m", worker, max_concurrency=2)]
        async with (
            GatewayProcess(tmp_path, models, admin=True, **shared) as one,
            GatewayProcess(tmp_path / "two", models, admin=True, **shared) as two,
        ):
            await one.ready(worker)
            await two.ready(worker)
            made = (await one.operators.post("/admin/keys", json={"tenant": "acme"})).json()
            await becomes(two, made["key"], 200)
            streams = [Streamed(), Streamed()]
            began = [
                asyncio.create_task(streamed.read(gateway, made["key"], max_tokens=2000))
                for streamed, gateway in zip(streams, (one, two), strict=True)
            ]
            await worker.wait_for(open=2)
            waiting = [
                asyncio.create_task(
                    gateway.http.post(CHAT, json=chat(ignore_eos=True, max_tokens=tokens), headers=bearer(key))
                )
                for gateway in (one, two)
                # A slot that one replica has freed may go to a key that the other one does not know to be revoked yet.
                for key, tokens in ((made["key"], 2000), (keys["other"], 2))
            ]
            for gateway in (one, two):
                await gateway.metric("sluice_queue_depth", 2, band="default")
            await until_text(streams)

            assert (await one.operators.delete(f"/admin/keys/{made['id']}")).status_code == 200
            async with asyncio.timeout(PATIENCE_S):  # it takes half a second; without it the streams go on for 100
                await asyncio.gather(*began)
                answers = await asyncio.gather(*waiting)
            for streamed in streams:
                assert streamed.status == 200
                assert json.loads(streamed.last_event)["error"]["code"] == "key_revoked"
                assert "[DONE]" not in streamed.text
            assert [answer.status_code for answer in answers] == [401, 200, 401, 200]
            for refused in answers[::2]:
                assert refused.json()["error"]["code"] == "key_revoked"
            for gateway in (one, two):
                await gateway.idle()
                await gateway.metric("sluice_requests_total", 2, outcome="cancelled", code="key_revoked")


async def until_text(streams: list[Streamed]) -> None:
    async def have_begun() -> bool:
        return all(streamed.text.count("data: ") > 3 for streamed in streams)

    await until(have_begun, "both streams have begun")


async def test_a_key_whose_time_is_up_ends_nothing_that_it_began(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    auth = {"enabled": True, "key_files": [str(file)]}
    keys = await issue_keys(file, "long")
    async with FakeWorker("m") as worker:
        worker.timing = Timing(decode_s=0.05)
        async with GatewayProcess(tmp_path, [model("m", worker)], key=keys["long"], auth=auth) as gateway:
            await gateway.ready(worker)
            short = (await issue_keys(file, "short", lifetime_s=5))["short"]
            await becomes(gateway, short, 200)
            streamed = Streamed()
            reading = asyncio.create_task(streamed.read(gateway, short, max_tokens=120))
            await until_text([streamed])
            worker.hold()
            await becomes(gateway, short, 401)
            assert not reading.done()
            worker.resume()
            await reading
            assert streamed.last_event == "[DONE]"


async def logged(gateway: GatewayProcess) -> str:
    """The log, up to a line that is made last."""
    mark = f"/admin/keys/{secrets.token_hex(8)}"
    assert (await gateway.operators.delete(mark)).is_client_error
    await asyncio.to_thread(gateway.process.wait_for_line, mark)
    return gateway.process.output


async def status(gateway: GatewayProcess, key: str) -> int:
    return (await gateway.http.get("/v1/models", headers=bearer(key))).status_code


async def becomes(gateway: GatewayProcess, key: str, expected: int) -> None:
    async def is_so() -> bool:
        return await status(gateway, key) == expected

    await until(is_so, f"{expected} for a key")


async def until_made(gateway: GatewayProcess, tenant: str) -> None:
    async def is_made() -> bool:
        return (await gateway.operators.post("/admin/keys", json={"tenant": tenant})).status_code == 201

    await until(is_made, "a key can be made")
