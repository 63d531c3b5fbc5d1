"""`sluice batch run`: as a process, against a real gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.fakes.worker import FakeWorker
from tests.integration.batches.house import FAST, Client, jsonl, line, lines
from tests.integration.gateway.running import GatewayProcess, model
from tests.processes import ROOT, Process

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Bench:
    def __init__(self, gateway: GatewayProcess, worker: FakeWorker) -> None:
        self.gateway = gateway
        self.worker = worker

    def command(self, place: Path, *more: str) -> Process:
        command = [sys.executable, "-m", "app", "batch", "run", "input.jsonl", "--output", "results.jsonl"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return Process([*command, "--base-url", f"{self.gateway.url}/v1", *more], environment, cwd=place)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    kept = tmp_path_factory.mktemp("kept")
    async with FakeWorker("m") as worker:
        batches = {"directory": str(kept), "range_lines": 8, **FAST}
        gateway = GatewayProcess(tmp_path_factory.mktemp("gateway"), [model("m", worker)], batches=batches)
        async with gateway:
            await gateway.ready(worker)
            yield Bench(gateway, worker)


async def ended(process: Process) -> int:
    return await asyncio.to_thread(process.wait, 60)


def records(path: Path) -> list[str]:
    return [json.loads(text)["custom_id"] for text in path.read_text().splitlines()]


async def test_results_and_errors_come_as_files(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "input.jsonl").write_bytes(jsonl([*lines(5, model="other"), line("bad", temperature=9)]))
    with bench.command(tmp_path, "--model", "m") as process:
        assert await ended(process) == 1, process.output
        assert "1 of 6 lines failed" in process.output
    assert records(tmp_path / "results.jsonl") == [f"c{i}" for i in range(5)]
    assert records(tmp_path / "results.errors.jsonl") == ["bad"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.jsonl", "results.errors.jsonl", "results.jsonl"]


async def test_an_interrupted_run_goes_on(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "input.jsonl").write_bytes(jsonl(lines(20)))
    bench.worker.hold()
    with bench.command(tmp_path) as process:
        await asyncio.to_thread(process.wait_for_line, "begun")
        process.signal(signal.SIGINT)
        assert await ended(process) == 1
        assert "Traceback" not in process.output
    bench.worker.resume()
    with bench.command(tmp_path) as process:
        assert await ended(process) == 0, process.output
        assert "going on with" in process.output
    assert records(tmp_path / "results.jsonl") == [f"c{i}" for i in range(20)]
    async with Client(bench.gateway) as client:
        assert len([batch async for batch in client.api.batches.list() if batch.endpoint]) == 2


async def test_bad_input_is_told_by_line(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "input.jsonl").write_bytes(jsonl([line("a"), line("a")]))
    with bench.command(tmp_path) as process:
        assert await ended(process) == 1
        assert "line 2: The custom_id was used by an earlier line." in process.output
    (tmp_path / "input.jsonl").write_bytes(b"{oops\n")
    with bench.command(tmp_path) as process:
        assert await ended(process) == 2
        assert "line 1 of the input is not a JSON object" in process.output
