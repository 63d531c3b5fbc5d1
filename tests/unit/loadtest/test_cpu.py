import os
import subprocess
import sys
import threading
import time

import pytest

from loadtest.cpu import (
    CpuReading,
    MeterError,
    cpu_between,
    descendants,
    parent_of,
    process_tree,
    pss_kib,
    read_cpu,
    read_pss_mib,
    split_cores,
)


def test_parent_is_counted_from_the_last_parenthesis() -> None:
    assert parent_of("4242 (a) b (c)) S 17 4242 4242 0 -1 4194560") == 17


def test_parent_of_this_process() -> None:
    with open("/proc/self/stat") as stat:
        assert parent_of(stat.read()) == os.getppid()


def test_pss_is_the_pss_line_and_not_its_relatives() -> None:
    rollup = (
        "00400000-7fff ---p 00000000 00:00 0 [rollup]\nRss: 5000 kB\nPss: 1234 kB\nPss_Dirty: 99 kB\nSwapPss: 7 kB\n"
    )
    assert pss_kib(rollup) == 1234


def test_no_pss_line_is_an_error() -> None:
    with pytest.raises(MeterError):
        pss_kib("Rss: 5000 kB\nSwapPss: 7 kB\n")


def test_descendants_reach_every_generation_and_no_stranger() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 13: 10, 20: 1, 21: 20}
    assert descendants(10, parents) == {10, 11, 12, 13}


def test_descendants_of_a_process_without_children() -> None:
    assert descendants(21, {21: 20}) == {21}


def test_a_child_is_in_the_tree() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert {os.getpid(), child.pid} <= process_tree(os.getpid())
    finally:
        child.communicate(b"\n", timeout=10)


def test_cpu_between_sums_differences_and_counts_newcomers_from_zero() -> None:
    before = CpuReading(0, {1: 100, 2: 50})
    after = CpuReading(9, {1: 130, 2: 55, 3: 7})
    assert cpu_between(before, after) == 42


def test_a_process_that_ended_makes_the_reading_worthless() -> None:
    with pytest.raises(MeterError, match=r"\[2\]"):
        cpu_between(CpuReading(0, {1: 100, 2: 50}), CpuReading(9, {1: 130}))


def _burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_the_clock_counts_threads_that_ended() -> None:
    before = read_cpu(os.getpid())
    thread = threading.Thread(target=_burn, args=(0.05,))
    thread.start()
    thread.join()
    assert cpu_between(before, read_cpu(os.getpid())) >= 50_000_000


def test_the_clock_is_far_finer_than_a_tick() -> None:
    before = read_cpu(os.getpid())
    _burn(0.0005)
    spent = cpu_between(before, read_cpu(os.getpid()))
    assert spent % 10_000_000 != 0
    assert spent >= 500_000


def test_a_process_that_is_gone_is_an_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(timeout=10)
    with pytest.raises(MeterError):
        read_cpu(child.pid)


def test_memory_of_this_process_is_read() -> None:
    assert read_pss_mib(os.getpid()) > 1


@pytest.mark.parametrize(
    ("available", "load", "target"),
    [({0, 1}, {0}, {1}), ({3, 5, 7}, {3}, {5}), ({4}, {4}, {4})],
)
def test_load_and_target_get_a_core_each_where_there_are_two(
    available: set[int], load: set[int], target: set[int]
) -> None:
    assert split_cores(available) == (load, target)
