"""Restarts, deadlines and the end of everything, with real processes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from app.launcher.processes import ProcessSpec
from app.launcher.supervisor import (
    LOG_KEPT_BYTES,
    LOG_LIMIT_BYTES,
    ProcessFailed,
    RestartPolicy,
    Supervisor,
    shorten_log,
)

QUICK = RestartPolicy(first_wait_s=0.01, longest_wait_s=0.02, deaths_allowed=3)


@pytest.mark.parametrize(
    ("deaths", "now", "expected"),
    [
        ([0], 0, 1),
        ([0, 1], 1, 2),
        ([0, 1, 2], 2, 4),
        ([0, 1, 2, 3], 3, 8),
        ([0, 1, 2, 3, 4], 4, None),
        ([0, 1, 2, 3, 400], 400, 1),
        ([0, 299], 299, 2),
        ([0, 300], 300, 1),
    ],
)
def test_waits_double_until_there_were_too_many_deaths(deaths: list[float], now: float, expected: float | None) -> None:
    assert RestartPolicy().wait_after(deaths, now) == expected


def test_waits_stay_below_the_longest() -> None:
    assert RestartPolicy(deaths_allowed=100).wait_after([0.0] * 50, 0) == 30


class Told:
    """What the supervisor says, with something to await."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._changed = asyncio.Condition()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._notifier = asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def count(self, count: int) -> None:
        async with asyncio.timeout(30), self._changed:
            await self._changed.wait_for(lambda: len(self.lines) >= count)


def spec(tmp_path: Path, code: str, name: str = "child", stop_s: float = 5.0) -> ProcessSpec:
    return ProcessSpec(name, (sys.executable, "-c", code), tmp_path / f"{name}.log", dict(os.environ), stop_s)


@pytest.fixture
async def told() -> Told:
    return Told()


@pytest.fixture
async def supervisor(told: Told) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(QUICK, told)
    yield supervisor
    await supervisor.stop()


async def failure(supervisor: Supervisor) -> ProcessFailed:
    async with asyncio.timeout(30):
        failed = await supervisor.failed()
    assert isinstance(failed, ProcessFailed)
    return failed


async def line_in(log: Path, text: str) -> None:
    async with asyncio.timeout(30):
        while text not in (log.read_text() if log.exists() else ""):
            await asyncio.sleep(0.01)


async def test_a_death_at_the_start_is_a_failure_with_the_processes_own_words(
    supervisor: Supervisor, tmp_path: Path, told: Told
) -> None:
    await supervisor.start(spec(tmp_path, "raise ValueError('no such kernel')"))
    failed = await failure(supervisor)
    assert str(failed) == "child ended with exit code 1: ValueError: no such kernel"
    assert failed.log_lines[-1] == "ValueError: no such kernel"
    assert told.lines == []


async def test_where_one_suffices_only_the_last_to_be_given_up_is_a_failure(
    supervisor: Supervisor, tmp_path: Path, told: Told
) -> None:
    waits = tmp_path / "go"
    last = f"import os, time\nwhile not os.path.exists({str(waits)!r}): time.sleep(0.01)\nraise ValueError('second')"
    specs = (spec(tmp_path, "raise ValueError('first')", "one"), spec(tmp_path, last, "other"))
    await supervisor.start(*specs, one_suffices=True)
    await told.count(1)
    assert told.lines[0].startswith("one ended with exit code 1: ValueError: first; going on without it")
    assert supervisor.given_up == {"one"}
    waits.touch()
    assert str(await failure(supervisor)) == "other ended with exit code 1: ValueError: second"
    assert supervisor.given_up == {"one", "other"}


async def test_a_command_that_does_not_exist_is_a_failure(supervisor: Supervisor, tmp_path: Path) -> None:
    await supervisor.start(ProcessSpec("child", ("/no/such/command",), tmp_path / "log", {}, 1.0))
    assert "/no/such/command: No such file or directory" in str(await failure(supervisor))


async def test_later_deaths_are_answered_by_restarts_until_they_are_too_many(
    supervisor: Supervisor, tmp_path: Path, told: Told
) -> None:
    supervisor.settled()
    await supervisor.start(spec(tmp_path, "print('RuntimeError: again'); raise SystemExit(3)"))
    failed = await failure(supervisor)
    assert str(failed) == "child ended with exit code 3 once too often: RuntimeError: again"
    assert len(told.lines) == 2
    assert told.lines[0] == "child ended with exit code 3: RuntimeError: again; starting it again in 0 s"
    assert (tmp_path / "child.log").read_text().count("again") == 3


async def test_stopping_is_in_reverse_order_and_asks_with_sigterm(supervisor: Supervisor, tmp_path: Path) -> None:
    order = tmp_path / "order"
    code = (
        "import signal, sys; from pathlib import Path\n"
        "def end(*_):\n"
        f"    open({str(order)!r}, 'a').write(sys.argv[1]); raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); signal.pause()"
    )
    for name in ("first", "second"):
        started = ProcessSpec(
            name, (sys.executable, "-c", code, f"{name} "), tmp_path / f"{name}.log", dict(os.environ), 5
        )
        await supervisor.start(started)
        await line_in(started.log, "up")
    await supervisor.stop()
    assert order.read_text() == "second first "


async def test_what_ignores_sigterm_is_killed_with_all_its_children(supervisor: Supervisor, tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('pid', child.pid, flush=True); child.wait()"
    )
    await supervisor.start(spec(tmp_path, code, stop_s=0.2))
    log = tmp_path / "child.log"
    await line_in(log, "\n")
    grandchild = psutil.Process(int(log.read_text().split()[1]))
    await supervisor.stop()
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


async def test_kill_does_not_wait_for_the_deadline(supervisor: Supervisor, tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    await supervisor.start(spec(tmp_path, code, stop_s=600))
    await line_in(tmp_path / "child.log", "up")
    stopping = asyncio.create_task(supervisor.stop())
    await asyncio.sleep(0)
    supervisor.kill()
    async with asyncio.timeout(30):
        await stopping


async def test_stopping_while_a_restart_waits(tmp_path: Path, told: Told) -> None:
    supervisor = Supervisor(RestartPolicy(first_wait_s=600, longest_wait_s=600), told)
    supervisor.settled()
    await supervisor.start(spec(tmp_path, "raise SystemExit(1)"))
    await told.count(1)
    async with asyncio.timeout(30):
        await supervisor.stop()


def test_a_log_is_cut_down_to_its_end(tmp_path: Path) -> None:
    one = spec(tmp_path, "")
    shorten_log(one)
    with one.log.open("wb") as file:
        file.truncate(LOG_LIMIT_BYTES)
        file.seek(0, 2)
        file.write(b"the end")
    shorten_log(one)
    assert one.log.stat().st_size == LOG_KEPT_BYTES
    assert one.log.read_bytes().endswith(b"the end")
