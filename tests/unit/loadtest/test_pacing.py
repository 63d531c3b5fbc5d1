import asyncio
import time
from functools import partial

import pytest

from loadtest.pacing import NS, Pacer, jittered_times, poisson_times


def test_jittered_times_put_one_in_each_slot() -> None:
    times = jittered_times(rate=50, seconds=2, seed=1)
    assert [at * 50 // NS for at in times] == list(range(100))


def test_poisson_times_are_ordered_in_bounds_and_near_the_rate() -> None:
    times = poisson_times(rate=200, seconds=50, seed=1)
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 50 * NS
    assert len(times) == pytest.approx(10_000, rel=0.05)


@pytest.mark.parametrize("make", [jittered_times, poisson_times])
def test_a_seed_fixes_the_schedule(make: type) -> None:
    assert make(100, 1, 7) == make(100, 1, 7) != make(100, 1, 8)


async def test_the_pacer_calls_in_order_and_never_early() -> None:
    loop, calls = asyncio.get_running_loop(), []
    done = loop.create_future()

    def note(name: str, due_ns: int) -> None:
        calls.append((name, time.monotonic_ns() >= due_ns))
        if len(calls) == 3:
            done.set_result(None)

    with Pacer(loop) as pacer:
        start = time.monotonic_ns()
        for name, after_ms in (("late", 20), ("early", 5), ("middle", 10)):
            due_ns = start + after_ms * 1_000_000
            pacer.at(due_ns, partial(note, name, due_ns))
        async with asyncio.timeout(30):
            await done
    assert calls == [("early", True), ("middle", True), ("late", True)]


async def test_what_is_past_fires_at_once() -> None:
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    with Pacer(loop) as pacer:
        pacer.at(0, lambda: done.set_result(None))
        async with asyncio.timeout(30):
            await done


async def test_a_callback_that_raises_does_not_stop_the_clock() -> None:
    loop = asyncio.get_running_loop()
    told, done = loop.create_future(), loop.create_future()
    loop.set_exception_handler(lambda _, context: told.set_result(context["exception"]))
    with Pacer(loop) as pacer:
        pacer.at(0, partial(divmod, 1, 0))
        pacer.at(time.monotonic_ns() + 1_000_000, partial(done.set_result, None))
        async with asyncio.timeout(30):
            await done
    assert isinstance(await told, ZeroDivisionError)
