"""What the machine can do, and whether it is enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import LaunchError
from app.launcher.machine import GIB, Machine, inspect_machine, require_disk, require_memory, shares


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [
        ((0, 1), 1, [(0, 1)]),
        ((0, 1), 2, [(0,), (1,)]),
        ((0, 2, 4, 6, 8), 2, [(0, 2), (4, 6, 8)]),
        ((3,), 2, [(3,), (3,)]),
        ((0, 1), 3, [(0,), (1,), (0,)]),
    ],
)
def test_cores_are_shared_out(cores: tuple[int, ...], workers: int, expected: list[tuple[int, ...]]) -> None:
    assert shares(cores, workers) == expected


def test_this_machine_is_described() -> None:
    machine = inspect_machine()
    assert machine.cores
    assert 0 < machine.memory_available < 2**50


def test_bfloat16_is_told_by_the_flags() -> None:
    assert Machine((0,), 1, frozenset({"avx512_bf16"})).computes_bfloat16
    assert not Machine((0,), 1, frozenset({"avx2", "avx512f"})).computes_bfloat16


def test_too_little_memory_is_told_with_both_numbers() -> None:
    machine = Machine((0,), memory_available=GIB)
    require_memory(machine, GIB, "a worker")
    with pytest.raises(LaunchError, match=r"a worker needs about 2\.5 GiB, 1\.0 GiB is available"):
        require_memory(machine, 5 * GIB // 2, "a worker")


def test_too_little_disk_is_told_for_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet", 1, "this")
    with pytest.raises(LaunchError, match=f"not enough disk in {tmp_path}"):
        require_disk(tmp_path / "not" / "yet", 2**60, "this")
