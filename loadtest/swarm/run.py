"""A run's directory: the records that each locust process has left in it."""

from __future__ import annotations

from pathlib import Path

from loadtest.swarm.answer import Record, decode

RECORDS = "records-*.jsonl"


def read_records(directory: Path) -> list[Record]:
    """All records, by the time they were due. Raises ValueError for a file that holds something else."""
    records: list[Record] = []
    for file in sorted(directory.glob(RECORDS)):
        with file.open("rb") as lines:
            records += decode(lines)
    return sorted(records, key=lambda record: record.at_s)
