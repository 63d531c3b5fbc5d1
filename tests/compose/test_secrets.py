"""The keys and passwords that docker-compose.yml's `secrets` makes, shown to a real Valkey and a real gateway."""

from __future__ import annotations

import json
import runpy
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model, until
from tests.processes import ROOT, Valkey

PARTS = ("gateway", "worker", "valkey", "valkey-exporter", "prometheus", "grafana", "operator")
# Sees what was denied to whom; the tests' own, added to the list that is shipped.
WATCHER = "user watcher on nopass ~* &* +@all\n"


@pytest.fixture(scope="module")
def main() -> Callable[[list[str], Path], int]:
    run: Callable[[list[str], Path], int] = runpy.run_path(str(ROOT / "deploy/compose/make_secrets.py"))["main"]
    return run


@pytest.fixture
def made(tmp_path: Path, main: Callable[[list[str], Path], int]) -> Path:
    for part in PARTS:
        (tmp_path / part).mkdir()
    assert main([], tmp_path) == 0
    return tmp_path


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def test_they_are_made_once(made: Path, main: Callable[[list[str], Path], int]) -> None:
    before = contents(made)
    assert main([], made) == 0
    assert contents(made) == before
    (made / "operator" / "complete").unlink()  # as if the first start had been interrupted
    assert main([], made) == 0
    assert not {text for text in contents(made).values() if text} & set(before.values())


def test_each_part_gets_its_own(made: Path) -> None:
    kept = contents(made)
    secrets = {kept["gateway/valkey_password"], kept["operator/client_key"], kept["operator/admin_key"]}
    for name, text in kept.items():
        shared = {"gateway/valkey_password", "operator/client_key", "operator/admin_key", "prometheus/sluice_admin_key"}
        assert name in shared or not any(secret in text for secret in secrets), name
    assert kept["gateway/worker_key"] == kept["worker/worker_key"]
    assert kept["prometheus/sluice_admin_key"] == kept["operator/admin_key"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in made.rglob("*") if path.is_file()}
    assert modes == {0o444}


def test_the_operator_is_shown_them(
    made: Path, main: Callable[[list[str], Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["client_key"], made) == 0
    assert capsys.readouterr().out.strip() == (made / "operator/client_key").read_text()
    for name in ("complete", "../gateway/worker_key", "none"):
        assert main([name], made) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith(f"error: {name}: there is admin_key, client_key, grafana_password")


@dataclass
class Guarded:
    """A Valkey that goes by the shipped list; `watcher` may see what it denied."""

    made: Path
    server: Valkey

    def client(self, user: str, password: str) -> redis.Redis:
        return redis.Redis(port=self.server.port, username=user, password=password, socket_timeout=8)

    def denied(self) -> list[Any]:
        with self.client("watcher", "any") as watcher:
            found: list[Any] = watcher.acl_log()
            return found


@pytest.fixture
def guarded(made: Path) -> Iterator[Guarded]:
    users = made / "users.acl"
    users.write_text((made / "valkey/users.acl").read_text() + WATCHER)
    with Valkey(made, "--aclfile", str(users), "--maxmemory-policy", "noeviction") as server:
        yield Guarded(made, server)


def test_whoever_has_no_password_may_ask_for_life(guarded: Guarded) -> None:
    with redis.Redis(port=guarded.server.port, socket_timeout=8) as anybody:
        assert anybody.ping() is True
        for forbidden in (["GET", "{sluice}:keys"], ["INFO"], ["FLUSHALL"], ["CONFIG", "GET", "*"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                anybody.execute_command(*forbidden)


def test_the_exporter_sees_figures_and_no_data(guarded: Guarded) -> None:
    passwords = json.loads((guarded.made / "valkey-exporter/passwords.json").read_text())
    assert set(passwords) == {"redis://valkey:6379", "redis://exporter@valkey:6379"}
    (password,) = set(passwords.values())
    with guarded.client("exporter", password) as exporter:
        assert exporter.info()["role"] == "master"
        assert exporter.config_get("maxmemory")
        for forbidden in (["GET", "{sluice}:keys"], ["HGETALL", "{sluice}:keys"], ["CONFIG", "SET", "maxmemory", "1"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                exporter.execute_command(*forbidden)


def test_the_gateway_has_its_keys_only(guarded: Guarded) -> None:
    password = (guarded.made / "gateway/valkey_password").read_text()
    with guarded.client("sluice", password) as gateway:
        assert gateway.set("{sluice}:x", 1)
        for forbidden in (["SET", "other", "1"], ["FLUSHALL"], ["CONFIG", "GET", "*"], ["ACL", "LIST"], ["KEYS", "*"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                gateway.execute_command(*forbidden)


@pytest_asyncio.fixture
async def gateway(guarded: Guarded, tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    kept = contents(guarded.made)
    async with FakeWorker("m") as worker:
        gateway = GatewayProcess(
            tmp_path,
            [model("m", worker, max_concurrency="auto")],
            admin=True,
            key=kept["operator/client_key"],
            admin_key=kept["operator/admin_key"],
            auth={
                "enabled": True,
                "secret_file": str(guarded.made / "gateway/auth_secret"),
                "key_files": [str(guarded.made / "gateway/keys.yaml")],
            },
            redis={
                "url": f"redis://sluice@127.0.0.1:{guarded.server.port}/0",
                "password_file": str(guarded.made / "gateway/valkey_password"),
            },
            tenants=[{"name": "compose", "limits": {"requests_per_min": 1000, "concurrent": 100}}],
            batches={"directory": str(tmp_path / "batches")},
        )
        async with gateway:
            await gateway.ready(worker)
            yield gateway


async def test_a_gateway_needs_no_more_than_it_may(guarded: Guarded, gateway: GatewayProcess) -> None:
    """Requests, limits, keys and a batch, and nothing of it was denied."""
    for stream in (False, True):
        assert (await gateway.http.post(CHAT, json=chat(stream=stream))).status_code == 200
    assert (await gateway.operators.get("/metrics")).status_code == 200
    made = await gateway.operators.post("/admin/keys", json={"tenant": "acme"})
    assert made.status_code < 300, made.text
    assert (await gateway.operators.get("/admin/queue")).status_code == 200
    await run_a_batch(gateway)
    assert guarded.denied() == []
    assert (await gateway.scrape()).sum("sluice_admission_degraded") == 0


async def run_a_batch(gateway: GatewayProcess) -> None:
    line = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": chat("a b")}).encode()
    file = await gateway.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", line)})
    wanted = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
    batch = (await gateway.http.post("/v1/batches", json=wanted)).raise_for_status().json()

    async def is_complete() -> bool:
        return bool((await gateway.http.get(f"/v1/batches/{batch['id']}")).json()["status"] == "completed")

    await until(is_complete, "the batch is completed", 30)
