"""The life of a batch: what happened to it, and the state that follows. Pure.

    validating ──▶ in_progress ──▶ finalizing ──▶ completed
        │  │            │ └──────▶ finalizing ──▶ expired
        │  └──▶ failed  ▼
        └────────▶ cancelling ──────────────────▶ cancelled

A batch is the list of its events, and never anything else: whoever reads the same events sees the same batch. The
shapes and the words are OpenAI's (https://platform.openai.com/docs/api-reference/batch).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

import msgspec


class Status(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in _FINAL


_FINAL = frozenset({Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED})


class IllegalEvent(Exception):
    """The event cannot follow on what happened before it."""


class Range(msgspec.Struct, array_like=True, frozen=True):
    """A run of lines of the input file: its bytes from `start` to `end`, `lines` requests.

    `first` is the number of its first line in the file, from 1; blank lines are no requests, and count there only.
    """

    start: int
    end: int
    first: int
    lines: int


class Fault(msgspec.Struct, frozen=True):
    """What is wrong with the input; `line` from 1, None for the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Progress(msgspec.Struct, frozen=True):
    """How many lines have a record, and the tokens they took."""

    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(*(mine + theirs for mine, theirs in zip(self._values(), other._values(), strict=True)))

    @property
    def lines(self) -> int:
        return self.completed + self.failed

    def _values(self) -> tuple[int, ...]:
        values: tuple[int, ...] = msgspec.structs.astuple(self)
        return values


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """Something that happened at `at`, wall time in seconds."""

    at: int


class Created(Event, frozen=True, kw_only=True):
    """A client was told that the batch exists. It expires at `expires_at`, its outputs `outputs_kept_s` after that."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    expires_at: int
    metadata: dict[str, str] | None
    outputs_kept_s: int


class Validated(Event, frozen=True, kw_only=True):
    """The input is sound: all of it asks one model."""

    model: str
    ranges: tuple[Range, ...]


class Rejected(Event, frozen=True, kw_only=True):
    """The input is not; no line was or will be run."""

    faults: tuple[Fault, ...]


class Cancelled(Event, frozen=True, kw_only=True):
    """The client asked to stop."""


class Closing(Event, frozen=True, kw_only=True):
    """Nothing more is run. The results go to files of these names, and then the batch ends as `outcome`."""

    outcome: Status
    output_file_id: str
    error_file_id: str


class Closed(Event, frozen=True, kw_only=True):
    """The files are there. One without a line was not made."""

    progress: Progress
    has_output: bool
    has_errors: bool


AnyEvent = Created | Validated | Rejected | Cancelled | Closing | Closed


@dataclass(frozen=True, slots=True)
class Batch:
    """What follows from the events so far; `events` is their number.

    `progress` is final with the batch; until then it is the records' to tell.
    """

    created: Created
    status: Status = Status.VALIDATING
    events: int = 1
    model: str = ""
    ranges: tuple[Range, ...] = ()
    faults: tuple[Fault, ...] = ()
    closing: Closing | None = None
    closed: Closed | None = None
    since: dict[Status, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.created.id

    @property
    def tenant(self) -> str:
        return self.created.tenant

    @property
    def total(self) -> int:
        return sum(run.lines for run in self.ranges)

    @property
    def may_run(self) -> bool:
        """Whether lines of it may be given to workers."""
        return self.status is Status.IN_PROGRESS

    def is_overdue(self, now: float) -> bool:
        """Whether its window is over, and nothing has been done about it.

        Never before its input was looked through: what expires says of every line that it was not run.
        """
        return now >= self.created.expires_at and self.status is Status.IN_PROGRESS


def of_events(events: Iterable[AnyEvent]) -> Batch:
    """The batch of which these are the events, in order. Raises IllegalEvent."""
    batch: Batch | None = None
    for event in events:
        batch = follow(batch, event)
    if batch is None:
        raise IllegalEvent("a batch begins by being created")
    return batch


def follow(batch: Batch | None, event: AnyEvent) -> Batch:
    """The batch after one more event. Raises IllegalEvent, and then nothing has happened."""
    if batch is None:
        if not isinstance(event, Created):
            raise IllegalEvent("a batch begins by being created")
        return Batch(event)
    status = _next(batch, event)
    since = batch.since if status is batch.status else {**batch.since, status: event.at}
    after = replace(batch, status=status, events=batch.events + 1, since=since)
    match event:
        case Validated():
            return replace(after, model=event.model, ranges=event.ranges)
        case Rejected():
            return replace(after, faults=event.faults)
        case Closing():
            return replace(after, closing=event)
        case Closed():
            return replace(after, closed=event)
    return after


def _next(batch: Batch, event: AnyEvent) -> Status:
    match batch.status, event:
        case Status.VALIDATING, Validated():
            return Status.IN_PROGRESS
        case Status.VALIDATING, Rejected():
            return Status.FAILED
        case Status.VALIDATING | Status.IN_PROGRESS, Cancelled():
            return Status.CANCELLING
        case Status.IN_PROGRESS, Closing(outcome=Status.COMPLETED | Status.EXPIRED):
            return Status.FINALIZING
        case Status.CANCELLING, Closing(outcome=Status.CANCELLED) if batch.closing is None:
            return Status.CANCELLING
        case Status.FINALIZING | Status.CANCELLING, Closed() if batch.closing is not None:
            return batch.closing.outcome
    raise IllegalEvent(f"{type(event).__name__} cannot follow while a batch is {batch.status}")
