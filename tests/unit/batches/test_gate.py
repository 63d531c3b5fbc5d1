"""The gate lets lines pass as others leave room, at once and not only at the next look."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from app.batches.line_runs import Gate, Preempted, Preemption
from app.batches.slack import Slack


class Bench:
    """Lines at a gate, each inside until it is told to leave."""

    def __init__(self) -> None:
        self.others = 0
        self.gate = Gate(lambda: self.others, most=6)
        self.lines: list[asyncio.Task[None]] = []
        self._leave = asyncio.Semaphore(0)

    async def arrive(self, count: int) -> None:
        self.lines += [asyncio.create_task(self._line()) for _ in range(count)]
        await asyncio.sleep(0)

    async def leave(self, count: int) -> None:
        for _ in range(count):
            self._leave.release()
        for _ in range(5):
            await asyncio.sleep(0)

    async def _line(self) -> None:
        async with self.gate.passed():
            await self._leave.acquire()


async def test_who_arrives_takes_a_lines_place_at_once() -> None:
    bench = Bench()
    bench.gate.set(Slack(limit=4), interactive=0)
    await bench.arrive(20)
    assert bench.gate.inside == 4
    bench.others = 2
    await bench.leave(2)
    assert bench.gate.inside == 2
    bench.others = 1
    await bench.leave(1)
    assert bench.gate.inside == 3
    await bench.leave(30)


async def test_never_more_than_the_most_and_none_without_slack() -> None:
    bench = Bench()
    bench.others = 8
    bench.gate.set(Slack(limit=4), interactive=8)
    await bench.arrive(20)
    bench.others = 0
    await bench.leave(1)
    assert bench.gate.inside == 6
    bench.gate.set(Slack(limit=0), interactive=8)
    await bench.leave(1)
    assert bench.gate.inside == 5
    bench.gate.set(Slack(limit=6), interactive=0)
    await bench.leave(30)


async def test_a_cancelled_turn_is_nobodys() -> None:
    bench = Bench()
    bench.gate.set(Slack(limit=1), interactive=0)
    await bench.arrive(3)
    bench.lines[1].cancel()
    bench._leave.release()
    bench.gate.set(Slack(limit=2), interactive=0)  # passes over the turn before its line has heard
    await bench.leave(2)
    outcomes = await asyncio.gather(*bench.lines, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), asyncio.CancelledError, type(None)]
    assert (bench.gate.inside, bench.gate.waiting) == (0, 0)


async def test_what_is_given_back_is_not_taken_again_before_the_next_look() -> None:
    bench = Bench()
    bench.gate.set(Slack(limit=4), interactive=0)
    await bench.arrive(20)
    bench.gate.narrow(2)
    await bench.leave(2)
    assert bench.gate.inside == 2
    await bench.leave(1)
    assert bench.gate.inside == 2
    bench.gate.set(Slack(limit=4), interactive=0)
    assert bench.gate.inside == 4
    await bench.leave(30)


async def working(began: Callable[[Preemption], None]) -> str:
    try:
        with Preemption() as preemption:
            began(preemption)
            await asyncio.sleep(3600)
    except Preempted:
        return "preempted"
    return "done"


async def test_a_line_is_taken_off_and_goes_on_by_itself() -> None:
    found: list[Preemption] = []
    task = asyncio.create_task(working(found.append))
    await asyncio.sleep(0)
    found[0]()
    found[0]()
    assert await task == "preempted"
    assert task.cancelling() == 0
    found[0]()  # it is over: nobody is cancelled


async def test_a_stop_in_the_same_moment_stays_one() -> None:
    for is_first in (True, False):
        found: list[Preemption] = []
        task = asyncio.create_task(working(found.append))
        await asyncio.sleep(0)
        for act in (task.cancel, found[0]) if is_first else (found[0], task.cancel):
            act()
        with pytest.raises(asyncio.CancelledError):
            await task
