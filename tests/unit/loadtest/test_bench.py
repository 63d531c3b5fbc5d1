"""The measurement ends, whatever a target does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loadtest.bench import DENSE, Findings, Plan, Visit, Window, _within, shortfall
from loadtest.loads import LoadError
from loadtest.processes import free_address
from loadtest.targets import Site, Target

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_block_has_its_time_and_no_more() -> None:
    async with _within(60):
        pass
    with pytest.raises(LoadError, match="not done within"):
        async with _within(0.01):
            await asyncio.Event().wait()


async def test_a_load_that_is_not_carried_is_said_or_no_figure() -> None:
    second = 1_000_000_000

    def window(tokens: int, *, load_busy: float) -> Window:
        return Window(int(0.4 * second), int(load_busy * second), second, 25, tokens)

    assert shortfall(DENSE, window(6_350, load_busy=0.95), 1) is None
    said = "5,000 of 6,400 chunks/s carried, the target's CPU 40% of a core"
    assert shortfall(DENSE, window(5_000, load_busy=0.7), 1) == said
    assert shortfall(DENSE, window(5_000, load_busy=0.95), 2) == said
    with pytest.raises(LoadError, match=r"5,000 of 6,400 chunks/s carried: worker and client"):
        shortfall(DENSE, window(5_000, load_busy=0.95), 1)


async def test_a_worker_that_takes_the_connection_and_says_nothing_is_a_note(tmp_path: Path) -> None:
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        gone.set()

    site = Site(free_address(), free_address(), free_address(), tmp_path)
    target = Target("t", lambda _: [], lambda: None, lambda: "")
    found = Findings()
    visit = Visit(target, Plan(repeats=1, window_s=0.05, warmup_s=0.0), 0, site, 0, found, margin_s=0.2)
    server = await asyncio.start_server(silent, "127.0.0.1", site.worker.port)
    async with server:
        await visit.weigh()
        await asyncio.wait_for(gone.wait(), 30)
    assert found.notes == ["memory: not done within 0.4 s"]
