"""locust in a process of its own, against a real gateway in front of a fake worker: figures, files, exit codes."""

from __future__ import annotations

import asyncio
import csv
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtest.swarm.answer import Record
from loadtest.swarm.run import read_records
from tests.fakes.engine import Timing
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.running import GatewayProcess, issue_keys, model
from tests.processes import ROOT, Process, Valkey

LIMIT_S = 400.0
CHATTING = ("-u", "6", "-t", "6s", "--think-s", "0.2", "--answer-tokens", "8", "--system-words", "20")


@asynccontextmanager
async def serving(directory: Path, **settings: Any) -> AsyncIterator[tuple[FakeWorker, GatewayProcess]]:
    timing = Timing(prefill_s=0.01, decode_s=0.01)
    async with FakeWorker("m", timing=timing, max_model_len=8192) as worker:
        async with GatewayProcess(directory, [model("m", worker, max_concurrency=4)], **settings) as gateway:
            await gateway.ready(worker)
            yield worker, gateway


async def locust(gateway: GatewayProcess, directory: Path, *options: str) -> tuple[int, str]:
    """Run it to its end: exit code and output."""
    files = ("--run-dir", str(directory), "--csv", str(directory / "locust"), "--html", str(directory / "locust.html"))
    argv = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--only-summary"]
    with Process([*argv, "--host", gateway.url, "--model", "m", "--stop-timeout", "10", *files, *options]) as running:
        code = await asyncio.to_thread(running.wait, LIMIT_S)
        return code, running.output


async def report(directory: Path, *options: str) -> int:
    with Process([sys.executable, "-m", "loadtest", "locust-report", str(directory), *options]) as running:
        return await asyncio.to_thread(running.wait, LIMIT_S)


def rows(directory: Path) -> dict[tuple[str, str], dict[str, str]]:
    """locust's own table, by type and name."""
    with (directory / "locust_stats.csv").open() as file:
        return {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}


def talk(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.kind == "chat"]


async def test_people_talk_while_a_batch_runs_and_goals_decide_the_exit_code(tmp_path: Path, valkey: Valkey) -> None:
    keys = await issue_keys(tmp_path / "keys.yaml", "acme", "beta")
    listed = tmp_path / "callers"
    listed.write_text("".join(f"{tenant}={key}\n" for tenant, key in keys.items()))
    settings = {
        "auth": {"enabled": True, "key_files": [str(tmp_path / "keys.yaml")]},
        "redis": {"url": valkey.url},
        "batches": {"directory": str(tmp_path / "batches")},
    }
    run = tmp_path / "run"
    async with serving(tmp_path, **settings) as (_, gateway):
        slos = ("--slo-ttft-p95-s", "30", "--slo-error-share", "0")
        options = ("--keys-file", str(listed), "--bands", "priority=1,flex=1", "--batch-lines", "3", *slos)
        code, output = await locust(gateway, run, *CHATTING, *options)
    assert code == 0, output
    assert "users at a rate of 100.00 per second" in output  # nobody said otherwise: a spike is one
    assert not any(key in output for key in keys.values())
    records = read_records(run)
    said = talk(records)
    assert {record.tenant for record in said} == {"acme", "beta"}
    assert {record.band for record in said} == {"priority", "flex"}
    assert all(record.is_served and record.ttft_s and record.variant == "v" for record in said)
    assert max(record.prompt_tokens for record in said) > min(record.prompt_tokens for record in said) + 60
    assert any(sum(record.gaps_s) > record.took_s / 4 for record in said), "chunks are seen as they come"
    assert [record.code for record in records if record.kind == "batch"][:1] == [""]
    table = rows(run)
    asked = sum(int(table["POST", f"chat {band}"]["Request Count"]) for band in ("priority", "flex"))
    assert 0.5 * len(said) <= asked <= len(said), "the CSV is written each second, and not once more at the end"
    for measure in ("TTFT", "ITL", "TPOT", "tokens/s"):
        assert int(table[measure, "flex"]["Request Count"]) > 0
    assert int(table["", "Aggregated"]["Request Count"]) < asked + int(table["ITL", "flex"]["Request Count"])
    assert "</html>" in (run / "locust.html").read_text()
    assert await report(run, "--slo-e2e-p95-s", "30") == 0
    assert await report(run, "--slo-e2e-p95-s", "0.000001") == 1
    assert "missed" in (run / "report.html").read_text()


async def test_a_missed_goal_and_refusals_show(tmp_path: Path) -> None:
    async with serving(tmp_path, admission={"queue_limit": 1}) as (_, gateway):
        goal = ("--slo-refused-share", "0", "--slo-error-share", "0", "--retry-after-cap-s", "1")
        code, output = await locust(gateway, tmp_path / "run", *CHATTING, "-u", "16", "--think-s", "0", *goal)
    assert code == 1, output
    said = talk(read_records(tmp_path / "run"))
    refused = [record for record in said if record.is_refused]
    assert refused
    assert not any(record.is_error for record in said)
    assert {record.status for record in refused} <= {429, 503}
    assert f"{refused[0].status} {refused[0].code}" in (tmp_path / "run" / "locust_failures.csv").read_text()
    span_s = said[-1].at_s - said[0].at_s
    assert len(refused) <= 16 * (4 / 3 * span_s + 4), "four askings with three waits of a second, again and again"


async def test_broken_streams_are_errors(tmp_path: Path) -> None:
    async with serving(tmp_path) as (worker, gateway):
        worker.inject("die_after:4")
        code, output = await locust(gateway, tmp_path / "run", *CHATTING, "-t", "3s", "--slo-error-share", "0.5")
    assert code == 1, output
    broken = talk(read_records(tmp_path / "run"))
    assert broken
    assert {record.is_error for record in broken} == {True}
    assert {record.status for record in broken} <= {200, 502, 503}


async def test_a_trace_is_replayed_at_its_times(tmp_path: Path) -> None:
    trace = tmp_path / "burst.csv"
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    trace.write_text(head + "".join(f"{at},x,{20 + at},{4 + at},0,API log\n" for at in (0, 0, 4, 8)))
    async with serving(tmp_path) as (_, gateway):
        options = ("--load-shape", "replay", "--trace", str(trace), "--slo-error-share", "0")
        code, output = await locust(gateway, tmp_path / "run", *options)
        assert code == 0, output
    records = read_records(tmp_path / "run")
    assert [round((record.at_s - records[0].at_s) / 4) for record in records] == [0, 0, 1, 2]
    assert [record.tokens for record in records] == [4, 4, 8, 12]
    assert all(record.ttft_s and record.ttft_s > 0 for record in records), "nothing is sent before it is due"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bands", "gold=1"), "error: unknown band 'gold'"),
        (("--keys", "sk-secret"), "error: key 1 is not of the form"),
        (("--load-shape", "replay", "--trace", "README.md"), "error: neither Mooncake"),
        (("--keys-file", "/nowhere"), "error: [Errno 2]"),
        (("--load-shape", "step", "-u", "2", "--low-users", "3"), "error: a load shape needs"),
    ],
)
async def test_wrong_options_are_told_in_one_line(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--run-dir", str(tmp_path)]
    with Process([*argv, "--host", "http://127.0.0.1:1", *options], cwd=ROOT) as running:
        assert await asyncio.to_thread(running.wait, LIMIT_S) == 2, running.output
        assert message in running.output
        assert "secret" not in running.output
