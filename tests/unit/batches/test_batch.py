"""The life of a batch: which events may follow on which, and what follows from them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.batches.batch import (
    AnyEvent,
    Batch,
    Cancelled,
    Closed,
    Closing,
    Created,
    Fault,
    IllegalEvent,
    Progress,
    Range,
    Rejected,
    Status,
    Validated,
    follow,
    of_events,
)

CREATED = Created(
    at=1, id="batch_1", tenant="t", endpoint="/v1/chat/completions", input_file_id="f", completion_window="24h",
    expires_at=100, metadata=None, outputs_kept_s=60,
)  # fmt: skip
VALIDATED = Validated(at=2, model="m", ranges=(Range(0, 10, 1, 3), Range(10, 20, 4, 2)))
REJECTED = Rejected(at=2, faults=(Fault("empty_file", "no requests"),))
CANCEL = Cancelled(at=3)
CLOSED = Closed(at=5, progress=Progress(completed=5), has_output=True, has_errors=False)


def closing(outcome: Status) -> Closing:
    return Closing(at=4, outcome=outcome, output_file_id="o", error_file_id="e")


EVENTS: list[AnyEvent] = [
    VALIDATED, REJECTED, CANCEL, CLOSED,
    closing(Status.COMPLETED), closing(Status.EXPIRED), closing(Status.CANCELLED),
]  # fmt: skip
GRAPH = {
    ("validating", "in_progress"), ("validating", "failed"), ("validating", "cancelling"),
    ("in_progress", "finalizing"), ("in_progress", "cancelling"), ("finalizing", "completed"),
    ("finalizing", "expired"), ("cancelling", "cancelled"), ("cancelling", "cancelling"),
}  # fmt: skip


@given(st.lists(st.sampled_from(EVENTS), max_size=12))
def test_any_events_keep_to_the_graph(events: list[AnyEvent]) -> None:
    batch = Batch(CREATED)
    for event in events:
        try:
            after = follow(batch, event)
        except IllegalEvent:
            continue
        assert (batch.status, after.status) in GRAPH
        assert after.events == batch.events + 1
        batch = after
    if batch.status.is_final:
        for event in EVENTS:
            with pytest.raises(IllegalEvent):
                follow(batch, event)


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([VALIDATED, closing(Status.COMPLETED), CLOSED], Status.COMPLETED),
        ([VALIDATED, closing(Status.EXPIRED), CLOSED], Status.EXPIRED),
        ([REJECTED], Status.FAILED),
        ([CANCEL, closing(Status.CANCELLED), CLOSED], Status.CANCELLED),
        ([VALIDATED, CANCEL, closing(Status.CANCELLED), CLOSED], Status.CANCELLED),
    ],
)
def test_every_end_can_be_reached(events: list[AnyEvent], status: Status) -> None:
    batch = of_events([CREATED, *events])
    assert batch.status is status
    assert batch.since[status] == events[-1].at


@pytest.mark.parametrize(
    "events",
    [[], [VALIDATED], [CREATED, CLOSED], [CREATED, CREATED], [CREATED, closing(Status.COMPLETED)],
     [CREATED, VALIDATED, closing(Status.CANCELLED)], [CREATED, VALIDATED, closing(Status.COMPLETED), CANCEL],
     [CREATED, CANCEL, closing(Status.CANCELLED), closing(Status.CANCELLED)], [CREATED, CANCEL, VALIDATED],
     [CREATED, closing(Status.EXPIRED)]],
)  # fmt: skip
def test_what_cannot_follow_is_refused(events: list[AnyEvent]) -> None:
    with pytest.raises(IllegalEvent):
        of_events(events)


def test_progress_adds_up() -> None:
    parts = [Progress(1, 2, 3, 4, 5, 6), Progress(10, 20, 30, 40, 50, 60)]
    assert sum(parts, Progress()) == Progress(11, 22, 33, 44, 55, 66)
    assert Progress(11, 22).lines == 33
    assert of_events([CREATED, VALIDATED]).total == 5


_BEGINNINGS: list[list[AnyEvent]] = [[], [VALIDATED], [REJECTED], [CANCEL]]


def test_only_what_runs_can_be_overdue() -> None:
    for events, now in itertools.product(_BEGINNINGS, (99, 100)):
        batch = of_events([CREATED, *events])
        assert batch.is_overdue(now) is (batch.status is Status.IN_PROGRESS and now == 100)
