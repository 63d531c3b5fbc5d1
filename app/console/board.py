"""Where the processes of one gateway tell each other what only they know: a small file each, in the directory that
they share for their metrics. One process alone has no directory, and needs none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from app.telemetry.refusals import Count, Kind
from app.telemetry.tally import Tally

_SUFFIX = ".console"


class Record(msgspec.Struct, array_like=True, frozen=True):
    """What one process knows. Times are wall-clock seconds; for `steps` see `history.Steps`."""

    in_flight: int
    steps: Mapping[int, Mapping[str, Tally]]
    refusals: list[tuple[Kind, Count]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


class Board:
    """One process' place on the board, and a look at the others'. Files of some KiB, in memory: nothing here waits."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._name = f"{os.getpid()}{_SUFFIX}"

    def write(self, record: Record) -> None:
        """Let the others read this, whole or not at all."""
        if self._directory is not None:
            unfinished = self._directory / f"{self._name}.new"
            unfinished.write_bytes(_encode(record))
            unfinished.replace(self._directory / self._name)

    def others(self) -> list[Record]:
        """What the other processes wrote last. What one left that was killed is taken away."""
        if self._directory is None:
            return []
        files = [file for file in self._directory.glob(f"*{_SUFFIX}") if file.name != self._name]
        return [record for file in files if (record := _read(file)) is not None]

    def close(self) -> None:
        """This process has nothing to tell any more."""
        if self._directory is not None:
            (self._directory / self._name).unlink(missing_ok=True)


def _read(file: Path) -> Record | None:
    try:
        os.kill(int(file.stem), 0)
        return _decode(file.read_bytes())
    except ProcessLookupError:
        file.unlink(missing_ok=True)
    except (OSError, ValueError, msgspec.DecodeError):
        pass  # it has just gone, or is of another version
    return None
