"""Which leases give their slot back when somebody better has to wait. Pure.

Only those whose request says that it can be taken off its worker and sent again: lines of batches. The youngest goes,
as it loses the least work. Nothing is gained on a worker that offers no slots now, as what comes free there stays so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Protocol, TypeVar


class Held(Protocol):
    """What it needs of a lease."""

    @property
    def worker_id(self) -> str: ...


L = TypeVar("L", bound=Held)


def chosen(preemptible: Iterable[L], workers: Collection[str], slots: Mapping[str, int], most: int) -> list[L]:
    """Up to `most` of the leases, youngest first, that are to be given back for somebody who waits for `workers`.

    `preemptible` come in the order in which they were granted, the latest first.
    """
    useful = (lease for lease in preemptible if lease.worker_id in workers and slots.get(lease.worker_id))
    return list(islice(useful, most))
