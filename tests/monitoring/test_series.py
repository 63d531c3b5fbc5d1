"""Every series that a panel, a rule or an alert names exists: a real Prometheus scrapes a gateway at work."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import yaml

from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model, until
from tests.monitoring.conftest import Binaries
from tests.ports import free_port
from tests.processes import Process, Valkey

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEPLOY = Path(__file__).parents[2] / "deploy"
VARIABLES = {"$__rate_interval": "30s", "$model": ".*", "$variant": ".*"}
FAMILY = re.compile(r"\b(?:sluice|vllm|redis)[a-zA-Z0-9_:]*")
QUOTED = re.compile(r"\"[^\"]*\"")
RECORDED = re.compile(r"\b[a-z]+:sluice[a-zA-Z0-9_]*:\w+|\bsluice:\w+:\w+")
EMPTY_UNLESS_SOMETHING_BREAKS = {
    "Refused by a limit",
    "Second attempts and resumed streams",
    "Ledger told anew, leases lost",
}


def panels() -> Iterator[tuple[str, list[str]]]:
    """Title and queries of each panel."""
    for file in sorted((DEPLOY / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            if queries := [target["expr"] for target in panel.get("targets", [])]:
                yield panel["title"], queries


def rules() -> list[dict[str, Any]]:
    files = [DEPLOY / "prometheus" / name for name in ("rules.yml", "alerts.yml")]
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


class Scraper:
    """A Prometheus with the shipped rules; scrapes and evaluates every second."""

    def __init__(self, binaries: Binaries, directory: Path, targets: dict[str, str]) -> None:
        port = free_port()
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10)
        jobs = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
        kept = [self._local(job, targets[job["job_name"]]) for job in jobs if job["job_name"] in targets]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(DEPLOY / "prometheus" / name) for name in ("rules.yml", "alerts.yml")],
            "scrape_configs": kept,
        }
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self.process = Process(
            [
                str(binaries.prometheus),
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ]
        )

    def _local(self, job: dict[str, Any], target: str) -> dict[str, Any]:
        """The shipped job, but for where it finds its targets."""
        kept = {
            name: value for name, value in job.items() if not name.endswith("_sd_configs") and name != "authorization"
        }
        return {**kept, "static_configs": [{"targets": [target]}]}

    async def ask(self, path: str, **parameters: str) -> Any:
        answer = (await self.http.get(path, params=parameters)).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    async def query(self, expr: str) -> list[Any]:
        for name, value in VARIABLES.items():
            expr = expr.replace(name, value)
        found: list[Any] = (await self.ask("/query", query=expr))["result"]
        return found

    async def families(self) -> set[str]:
        """Names of all families that any target exports, with samples or without."""
        return {entry["metric"] for entry in await self.ask("/targets/metadata")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scraper(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scraper]:
    """A Prometheus that has seen a gateway at work: whole answers, streams, refusals, a worker's failure."""
    directory = tmp_path_factory.mktemp("scraped")
    async with AsyncExitStack() as opened:
        worker = await opened.enter_async_context(FakeWorker("m"))
        valkey = opened.enter_context(Valkey(directory))
        kept = {"directory": str(directory / "batches")}
        gateway = GatewayProcess(directory, [model("m", worker)], redis={"url": valkey.url}, batches=kept)
        await opened.enter_async_context(gateway)
        await gateway.ready(worker)
        targets = {"sluice": f"127.0.0.1:{gateway.port}", "vllm": f"127.0.0.1:{worker.port}"}
        scraper = Scraper(binaries, directory, targets)
        opened.push_async_callback(scraper.http.aclose)
        opened.callback(scraper.process.stop)
        await asyncio.to_thread(scraper.process.wait_for_line, "Server is ready")
        working = asyncio.create_task(_work(gateway.http))
        opened.callback(working.cancel)

        async def has_seen_enough() -> bool:
            wanted = (
                'sum(rate(sluice_requests_total{outcome="failed"}[30s])) > 0',
                "sluice:time_to_first_token_missed:ratio_rate_5m",
                "sluice:requests_failed:ratio_rate_5m",
                "sluice_batch_lines_ended_total > 0",
            )
            return all([await scraper.query(query) for query in wanted])

        await until(has_seen_enough, "Prometheus has seen the gateway at work", 60)
        yield scraper


async def _begin_batch(client: httpx.AsyncClient) -> None:
    line = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": chat("a b")}).encode()
    purpose = {"purpose": "batch"}
    file = await client.post("/v1/files", data=purpose, files={"file": ("a.jsonl", line)})
    wanted = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
    (await client.post("/v1/batches", json=wanted)).raise_for_status()


async def _work(client: httpx.AsyncClient) -> None:
    await _begin_batch(client)
    bodies = [
        chat("a b c d"),
        chat("a b c d", stream=True),
        chat("a b c d", stream=True, service_tier="priority"),
        chat("a", model="unknown"),
        chat("a b", stream=True, x_fault="die_after:2"),
    ]
    while True:
        for body in bodies:
            try:
                await client.post(CHAT, json=body)
            except httpx.HTTPError:  # the stream that its worker breaks off
                continue


async def test_every_panel_shows_something(scraper: Scraper) -> None:
    families, recorded = await scraper.families(), {rule.get("record") for rule in rules()}
    empty = set()
    for title, queries in panels():
        for query in queries:
            _exist(query, families, recorded)
        if not any([await scraper.query(query) for query in queries]):
            empty.add(title)
    assert empty <= EMPTY_UNLESS_SOMETHING_BREAKS


async def test_every_rule_names_series_that_exist(scraper: Scraper) -> None:
    families, recorded = await scraper.families(), {rule.get("record") for rule in rules()}
    for rule in rules():
        _exist(rule["expr"], families, recorded)
    state = {
        rule["name"]: rule["health"] for group in (await scraper.ask("/rules"))["groups"] for rule in group["rules"]
    }
    assert set(state.values()) == {"ok"}, state


def _exist(query: str, families: set[str], recorded: set[str | None]) -> None:
    names = set(RECORDED.findall(query))
    assert names <= recorded
    for name in set(FAMILY.findall(QUOTED.sub("", RECORDED.sub("", query)))):
        base = re.sub(r"_(?:bucket|sum|count|total)$", "", name)
        assert {name, base} & families, name
