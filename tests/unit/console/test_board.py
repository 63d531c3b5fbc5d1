"""What processes tell each other: read whole or not at all, gone with whoever wrote it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from app.console.board import Board, Record
from app.inference import Outcome
from app.telemetry.refusals import Count, Kind
from app.telemetry.tally import Tally
from app.tenant import Band

RECORD = Record(
    3, {8: {"m:v": Tally(1, 2, {3: 1})}}, [(Kind(Outcome.FAILED, "worker_lost", "m", "t", Band.FLEX), Count(2, 1, 2))]
)


def written_by(directory: Path, pid: int) -> Path:
    """The record as if that process had written it."""
    Board(directory).write(RECORD)
    (own,) = directory.glob("*.console")
    return own.rename(directory / f"{pid}.console")


def test_one_alone_has_nobody_to_tell() -> None:
    board = Board(None)
    board.write(RECORD)
    assert board.others() == []
    board.close()


def test_others_read_what_was_written(tmp_path: Path) -> None:
    written_by(tmp_path, os.getppid())
    board = Board(tmp_path)
    board.write(RECORD)
    assert board.others() == [RECORD]
    board.close()
    assert [file.name for file in tmp_path.iterdir()] == [f"{os.getppid()}.console"]


def test_what_a_killed_process_left_is_taken_away(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    written_by(tmp_path, gone.pid)
    assert Board(tmp_path).others() == []
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    written_by(tmp_path, os.getppid()).write_bytes(b"\x93\x01")
    (tmp_path / "notes.console").write_bytes(b"")
    assert Board(tmp_path).others() == []
