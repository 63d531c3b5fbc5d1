"""What this machine can do, read once; and whether it is enough, decided before any work starts."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from app.errors import LaunchError

GIB = 1024**3
CPU_INFO = Path("/proc/cpuinfo")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
NVIDIA_DEVICE = Path("/dev/nvidiactl")
LIBRARY_DIRECTORIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
TCMALLOC = "libtcmalloc_minimal.so.4"
LIBNUMA = "libnuma.so.1"


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` are the ids this process may run on; `memory_available` is in bytes."""

    cores: tuple[int, ...]
    memory_available: int
    cpu_flags: frozenset[str] = frozenset()
    has_nvidia: bool = False
    tcmalloc: Path | None = None
    has_libnuma: bool = True

    @property
    def computes_bfloat16(self) -> bool:
        """Whether bfloat16 matrix products run in hardware: Intel's and AMD's flags, and Arm's."""
        return not self.cpu_flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def inspect_machine() -> Machine:
    return Machine(
        cores=tuple(sorted(os.sched_getaffinity(0))),
        memory_available=_memory_available(),
        cpu_flags=_cpu_flags(),
        has_nvidia=NVIDIA_DEVICE.exists(),
        tcmalloc=_library(TCMALLOC),
        has_libnuma=_loads(LIBNUMA),
    )


def require_memory(machine: Machine, need: int, purpose: str) -> None:
    """Raises LaunchError when less than `need` bytes are available."""
    if machine.memory_available < need:
        raise LaunchError(
            f"not enough memory: {purpose} needs about {_gib(need)}, {_gib(machine.memory_available)} is available"
        )


def require_libnuma(machine: Machine) -> None:
    """Raises LaunchError without the one library that vLLM's CPU build needs and no wheel brings.

    vLLM itself only warns that it cannot be imported, and fails later over something else.
    """
    if not machine.has_libnuma:
        raise LaunchError(
            f"vLLM's CPU build needs {LIBNUMA}: `apt-get install libnuma1` (Debian, Ubuntu)"
            " or `dnf install numactl-libs` (Fedora, RHEL)"
        )


def require_disk(directory: Path, need: int, purpose: str) -> None:
    """Raises LaunchError when the file system that will hold `directory` has less than `need` bytes free."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise LaunchError(f"not enough disk in {existing}: {purpose} needs about {_gib(need)}, {_gib(free)} is free")


def shares(cores: tuple[int, ...], workers: int) -> list[tuple[int, ...]]:
    """`cores` cut into one run of neighbours per worker; with fewer cores than workers they take turns.

    Worker threads that wait spin: two workers on one core cost each other far more than half.
    """
    if len(cores) < workers:
        return [(cores[index % len(cores)],) for index in range(workers)]
    bounds = [len(cores) * index // workers for index in range(workers + 1)]
    return [cores[start:end] for start, end in itertools.pairwise(bounds)]


def _memory_available() -> int:
    available = int(psutil.virtual_memory().available)
    for path in CGROUP_LIMITS:
        try:
            available = min(available, int(path.read_text()))
        except (OSError, ValueError):  # absent, or the word "max"
            continue
    return available


def _cpu_flags() -> frozenset[str]:
    try:
        text = CPU_INFO.read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return frozenset(line.partition(":")[2].split())


def _library(name: str) -> Path | None:
    paths = (Path(directory) / name for directory in LIBRARY_DIRECTORIES)
    return next((path for path in paths if path.exists()), None)


def _loads(name: str) -> bool:
    """Whether the loader finds a shared library, wherever that is on this machine."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
