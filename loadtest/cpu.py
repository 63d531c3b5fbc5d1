"""What a process tree costs: its CPU time and its memory, read from the kernel.

CPU time comes from each process's own POSIX CPU clock (clock_getcpuclockid(3)). It counts nanoseconds over all threads,
ended ones too. The alternatives lose time: `/proc/PID/stat` counts ticks of 10 ms, `/proc/PID/schedstat` sees only the
main thread, and the sum over `/proc/PID/task/*/schedstat` forgets threads that ended.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


class MeterError(Exception):
    """The reading cannot be trusted."""


def parent_of(stat: str) -> int:
    """The parent's pid from the text of `/proc/PID/stat` (proc_pid_stat(5)).

    The command name is field 2, in parentheses, and may itself hold spaces and parentheses: fields count from the last.
    """
    return int(stat[stat.rindex(")") + 1 :].split()[1])


def pss_kib(smaps_rollup: str) -> int:
    """Proportional set size in KiB from the text of `/proc/PID/smaps_rollup` (proc_pid_smaps(5))."""
    for line in smaps_rollup.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise MeterError("smaps_rollup has no Pss line")


def descendants(root: int, parents: Mapping[int, int]) -> set[int]:
    """`root` and all below it, given each process's parent."""
    tree = {root}
    while True:
        below = {pid for pid, parent in parents.items() if parent in tree} - tree
        if not below:
            return tree
        tree |= below


def process_tree(root: int) -> set[int]:
    """The pids of `root` and its living descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = parent_of((entry / "stat").read_text())
            except OSError:
                continue  # ended while we were looking
    return descendants(root, parents)


def cpu_clock_id(pid: int) -> int:
    """The clock id of a process's CPU time: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED), linux/posix-timers.h."""
    return (~pid << 3) | 2


@dataclass(frozen=True)
class CpuReading:
    """CPU time so far in ns, by pid, and when it was read."""

    at_ns: int
    spent_ns: Mapping[int, int]


def read_cpu(root: int) -> CpuReading:
    """Read the CPU clocks of `root` and its descendants.

    Raises:
        MeterError: a process ended between being listed and being read.
    """
    try:
        spent = {pid: time.clock_gettime_ns(cpu_clock_id(pid)) for pid in process_tree(root)}
    except OSError as error:
        raise MeterError("a process of the target ended while it was read") from error
    return CpuReading(time.monotonic_ns(), spent)


def cpu_between(before: CpuReading, after: CpuReading) -> int:
    """CPU time in ns between two readings; a process born in between counts from zero.

    Raises:
        MeterError: a process ended in between and took its count with it.
    """
    ended = before.spent_ns.keys() - after.spent_ns.keys()
    if ended:
        raise MeterError(f"processes of the target ended between two readings: {sorted(ended)}")
    return sum(spent - before.spent_ns.get(pid, 0) for pid, spent in after.spent_ns.items())


def read_pss_mib(root: int) -> float:
    """Proportional set size of the tree in MiB: shared pages count once, split among those that map them."""
    return sum(pss_kib(Path(f"/proc/{pid}/smaps_rollup").read_text()) for pid in process_tree(root)) / 1024


def split_cores(available: set[int]) -> tuple[set[int], set[int]]:
    """The cores for (worker and client, target): one each where there are two, else all for both."""
    if len(available) < 2:
        return available, available
    first, second, *_ = sorted(available)
    return {first}, {second}


def usable_cores() -> set[int]:
    return os.sched_getaffinity(0)
