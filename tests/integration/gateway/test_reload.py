"""The configuration changes while the gateway runs: taken whole, or refused whole, and no request notices."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.fakes.reading import DONE, events
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUICK: dict[str, Any] = {"reload": {"watch_interval_s": 0.1, "dns_interval_s": 0.1}}


@asynccontextmanager
async def running(directory: Path, *workers: FakeWorker, **settings: Any) -> AsyncIterator[GatewayProcess]:
    async with GatewayProcess(directory, [model("m", *workers)], **{**QUICK, **settings}) as gateway:
        await gateway.ready(*workers)
        yield gateway


async def asked(gateway: GatewayProcess, name: str = "m") -> int:
    return (await gateway.http.post(CHAT, json=chat(model=name))).status_code


async def answered(gateway: GatewayProcess, name: str, status: int) -> None:
    """Wait until the model is answered so."""

    async def is_so() -> bool:
        return await asked(gateway, name) == status

    await until(is_so, f"{name} is answered {status}")


async def noted(gateway: GatewayProcess, outcome: str, count: float = 1) -> None:
    await gateway.metric("sluice_config_reloads_total", count, 20, outcome=outcome)


async def test_a_new_model_is_served_and_an_old_one_leaves(tmp_path: Path) -> None:
    async with FakeWorker("m") as old, FakeWorker("n") as new, running(tmp_path, old) as gateway:
        assert await asked(gateway, "n") == 404
        gateway.configure(models=[model("n", new)])
        await answered(gateway, "n", 200)
        assert await asked(gateway, "m") == 404
        assert list(await gateway.workers()) == [f"127.0.0.1:{new.port}"]
        await noted(gateway, "applied")


async def test_a_stream_on_a_worker_that_leaves_goes_on_to_its_end(tmp_path: Path) -> None:
    async with FakeWorker("m") as old, FakeWorker("m") as new, running(tmp_path, old) as gateway:
        body = chat(stream=True, max_tokens=4, x_timing={"decode_s": 0.3}, ignore_eos=True)
        streaming = asyncio.create_task(gateway.http.post(CHAT, json=body))
        await old.wait_for(running=1)
        gateway.configure(models=[model("m", new)])
        await gateway.ready(new)
        assert await asked(gateway) == 200
        assert len(new.requests) >= 1
        answer = await streaming
        assert events(answer.content)[-1].data == DONE

        async def is_forgotten() -> bool:
            return not (await gateway.scrape()).sum("sluice_worker_state", worker=f"127.0.0.1:{old.port}")

        await until(is_forgotten, "the old worker's series are gone")
        await old.wait_for(connections=0)


async def test_slots_of_a_worker_that_stays_can_change(tmp_path: Path) -> None:
    async with FakeWorker("m") as worker, running(tmp_path, worker) as gateway:
        await gateway.metric("sluice_slots_capacity", 64)
        gateway.configure(models=[model("m", worker, max_concurrency=3)])
        await gateway.metric("sluice_slots_capacity", 3, 20)
        assert await gateway.state_of(worker) == "ready"


async def test_a_tenants_terms_change(tmp_path: Path) -> None:
    settings = {"admission": {"trust_tenant_header": True}}
    async with FakeWorker("m") as worker, running(tmp_path, worker, **settings) as gateway:
        headers = {"x-sluice-tenant": "acme"}
        assert (await gateway.http.post(CHAT, json=chat(), headers=headers)).status_code == 200
        gateway.configure(tenants=[{"name": "acme", "weight": 3, "models": ["other"]}])
        await noted(gateway, "applied")
        assert (await gateway.http.post(CHAT, json=chat(), headers=headers)).status_code == 404
        assert (await gateway.scrape()).sum("sluice_tenant_weight", tenant="acme") == 3
        gateway.configure(tenants=[])
        await noted(gateway, "applied", 2)
        assert (await gateway.scrape()).sum("sluice_tenant_weight", tenant="acme") == 1


BAD: dict[str, Any] = {
    "no YAML": b"models: [\n",
    "an unknown key": b"model: []\n",
    "nothing": b"",
    "not UTF-8": b"\xff\xfe",
    "another listener": None,
    "a manifest that is not there": None,
    "a worker twice": None,
}


@pytest.mark.parametrize("fault", BAD)
async def test_a_bad_file_changes_nothing(tmp_path: Path, fault: str) -> None:
    async with FakeWorker("m") as worker, running(tmp_path, worker) as gateway:
        good = gateway.config.read_bytes()
        text = BAD[fault] if BAD[fault] is not None else spoiled(yaml.safe_load(good), fault)
        gateway.config.write_bytes(text)
        await noted(gateway, "refused")
        assert (await gateway.scrape()).sum("sluice_config_reload_success") == 0
        assert await asked(gateway) == 200
        assert not (await gateway.scrape()).sum("sluice_tenant_weight")
        refused = await gateway.operators.post("/admin/reload")
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("The configuration is refused")
        gateway.config.write_bytes(good)
        await noted(gateway, "unchanged")
        assert (await gateway.scrape()).sum("sluice_config_reload_success") == 1
        assert await gateway.state_of(worker) == "ready"


def spoiled(config: dict[str, Any], fault: str) -> bytes:
    """With something good beside it, which must not be taken either."""
    config["tenants"] = [{"name": "acme", "weight": 9}]
    variant = config["models"][0]["variants"][0]
    if fault == "another listener":
        config["listen"]["processes"] = 3
    elif fault == "a manifest that is not there":
        variant["manifest"] = "/nowhere/sluice.json"
    else:
        config["models"].append({**config["models"][0], "name": "n"})
    return yaml.safe_dump(config).encode()


async def test_a_process_that_is_replaced_while_a_file_is_refused_begins_with_what_the_others_have(
    tmp_path: Path,
) -> None:
    """Else its failure to start would end them all."""
    two = {"listen": {"processes": 2}}
    async with FakeWorker("m") as worker, running(tmp_path, worker, **two) as gateway:

        async def begun(count: int) -> None:
            async def have_begun() -> bool:
                return gateway.process.output.count("Application startup complete") == count

            await until(have_begun, f"{count} processes have begun", 60)

        await begun(2)
        config = yaml.safe_load(gateway.config.read_text())
        gateway.config.write_bytes(spoiled(config, "a manifest that is not there"))
        await noted(gateway, "refused", 2)
        children = psutil.Process(gateway.process.pid).children()
        next(child for child in children if "spawn_main" in " ".join(child.cmdline())).kill()
        await begun(3)
        assert await asked(gateway) == 200


async def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    async with FakeWorker("m") as worker, running(tmp_path, worker) as gateway:
        os.truncate(gateway.config, 100 * 1024 * 1024)
        await noted(gateway, "refused")
        assert "larger than" in (await gateway.operators.post("/admin/reload")).json()["error"]["message"]
        assert await asked(gateway) == 200


async def test_a_file_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    async with FakeWorker("m") as worker, running(tmp_path, worker) as gateway:
        gateway.config.unlink()
        await noted(gateway, "refused")
        assert await asked(gateway) == 200


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_signal_has_every_process_look_at_once(tmp_path: Path, processes: int) -> None:
    settings = {"reload": {"watch_interval_s": 0}, "listen": {"processes": processes}}
    async with FakeWorker("m") as old, FakeWorker("n") as new, running(tmp_path, old, **settings) as gateway:
        gateway.configure(models=[model("m", old), model("n", new)])
        assert await asked(gateway, "n") == 404
        gateway.process.signal(signal.SIGHUP)

        async def all_know() -> bool:
            """Sixteen new connections: hardly all of them to the same process."""
            for _ in range(16):
                async with httpx.AsyncClient(base_url=gateway.url, timeout=30) as http:
                    if (await http.get("/v1/models/n")).status_code != 200:
                        return False
            return True

        await until(all_know, "every process knows the new model", 60)


async def test_workers_of_a_file_come_and_go(tmp_path: Path) -> None:
    listed = tmp_path / "workers.yaml"
    async with FakeWorker("m") as one, FakeWorker("m") as two:
        entries = [{"url": worker.url, "served_model": "m"} for worker in (one, two)]
        listed.write_text(yaml.safe_dump(entries[:1]))
        models = [{"name": "m", "variants": [{"name": "v", "workers_file": str(listed)}]}]
        async with GatewayProcess(tmp_path, models, **QUICK) as gateway:
            await gateway.ready(one)
            listed.write_text(yaml.safe_dump(entries))
            await noted(gateway, "applied")
            await gateway.ready(one, two)
            listed.write_text(yaml.safe_dump(entries[1:]))
            await noted(gateway, "applied", 2)
            assert list(await gateway.workers()) == [f"127.0.0.1:{two.port}"]
            assert await asked(gateway) == 200


async def test_no_request_notices_a_change(tmp_path: Path) -> None:
    """Requests without a pause, while the two workers take turns in the configuration."""
    async with FakeWorker("m") as one, FakeWorker("m") as two, running(tmp_path, one, two) as gateway:
        statuses: list[int] = []
        is_over = asyncio.Event()

        async def ask() -> None:
            while not is_over.is_set():
                statuses.append(await asked(gateway))

        askers = [asyncio.create_task(ask()) for _ in range(4)]
        for turn in range(4):
            gateway.configure(models=[model("m", (one, two)[turn % 2])])
            await noted(gateway, "applied", 2 * turn + 1)
            gateway.configure(models=[model("m", one, two)])
            await noted(gateway, "applied", 2 * turn + 2)
            await gateway.ready(one, two)
        is_over.set()
        await asyncio.gather(*askers)
        assert len(statuses) > 20
        assert set(statuses) == {200}


async def serving(gateway: GatewayProcess, *workers: FakeWorker) -> None:
    """Wait until these are the workers, and all are ready."""
    expected = {f"{worker.host}:{worker.port}": "ready" for worker in workers}

    async def are_there() -> bool:
        return {name: worker["state"] for name, worker in (await gateway.workers()).items()} == expected

    await until(are_there, f"the workers are {sorted(expected)}")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
@pytest.mark.parametrize("place", ["configuration", "file"])
async def test_a_names_addresses_come_and_go(tmp_path: Path, place: str) -> None:
    """The system's own resolver, with a hosts file that only this gateway sees."""
    hosts, listed = tmp_path / "hosts", tmp_path / "workers.yaml"
    async with FakeWorker("m", host="127.0.0.2") as one:
        async with FakeWorker("m", host="127.0.0.3", port=one.port) as two:
            hosts.write_text("127.0.0.2 pods.sluice.test\n")
            dns = {"dns": f"pods.sluice.test:{one.port}", "served_model": "m"}
            listed.write_text(yaml.safe_dump([dns]))
            workers = {"workers": [dns]} if place == "configuration" else {"workers_file": str(listed)}
            models = [{"name": "m", "variants": [{"name": "v", **workers}]}]
            privately = ["unshare", "-m", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "-"]
            async with GatewayProcess(tmp_path, models, wrapper=privately, **QUICK) as gateway:
                await serving(gateway, one)
                hosts.write_text("127.0.0.2 pods.sluice.test\n127.0.0.3 pods.sluice.test\n")
                await serving(gateway, one, two)
                hosts.write_text("127.0.0.3 pods.sluice.test\n")
                await serving(gateway, two)
                before = len(one.requests)
                assert await asked(gateway) == 200
                assert len(one.requests) == before
                hosts.write_text("")
                await serving(gateway)
                assert await asked(gateway) == 503
                hosts.write_text("127.0.0.2 pods.sluice.test\n")
                await serving(gateway, one)
                assert await asked(gateway) == 200
