"""A ticket is a place in the queue; a lease is the right to one slot. Neither holds a payload."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import msgspec

from app.errors import Allowance
from app.inference import Band, InferenceRequest, Preempted, QueueListener, Spent, TokenUsage
from app.tenant import ANONYMOUS, Tenant


class Ticket(msgspec.Struct, frozen=True):
    """What the queue knows of a request.

    `candidates` are worker ids, best first; `deadline` is monotonic seconds, after which the ticket must not be
    granted. `prompt_bytes` and `max_tokens` (for all of its choices together) are what its cost is estimated from; the
    bytes are also what the request holds in memory while it waits. `on_wait` is told where it stands: see `announcer`.
    `on_preempt` is told when its slot is wanted back: see `preemption`. It has waited for `waited_s` elsewhere. A trial
    that is refused counts as no refusal: the request goes on elsewhere.
    """

    id: str
    band: Band
    candidates: tuple[str, ...]
    model: str = ""
    tenant: Tenant = ANONYMOUS
    prompt_bytes: int = 0
    max_tokens: int | None = None
    deadline: float = float("inf")
    on_wait: QueueListener | None = None
    on_preempt: Preempted | None = None
    waited_s: float = 0.0
    is_trial: bool = False

    @classmethod
    def of(
        cls,
        request: InferenceRequest,
        candidates: tuple[str, ...],
        *,
        deadline: float = float("inf"),
        waited_s: float = 0.0,
    ) -> Ticket:
        """Of a request that has waited elsewhere for so long. With a `deadline` of its own it is a trial."""
        return cls(
            id=request.id,
            band=request.band,
            candidates=candidates,
            model=request.resolved_model,
            tenant=request.tenant,
            prompt_bytes=request.prompt_bytes,
            max_tokens=request.max_output,
            deadline=min(request.deadline, deadline),
            on_wait=request.on_wait,
            on_preempt=request.on_preempt,
            waited_s=waited_s,
            is_trial=deadline < float("inf"),
        )


class Lease(Protocol):
    """One slot of one worker, held until `release`. Leaving it as a context manager releases it.

    `release` never waits and never fails, so that it cannot be cancelled half-way; releasing twice is releasing once.
    What was really `spent` settles what the ticket was estimated to cost and reserved of its tenant's limits; None is
    nothing: it was never served.
    """

    @property
    def worker_id(self) -> str: ...

    @property
    def waited_s(self) -> float: ...

    @property
    def allowances(self) -> tuple[Allowance, ...]: ...

    async def move(self, candidates: tuple[str, ...]) -> None:
        """Give this slot up and take one of `candidates`, ahead of those who have not been granted anything yet."""

    def release(self, spent: TokenUsage | Spent | None = None) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Admission(Protocol):
    """The queue in front of the workers."""

    async def admit(self, ticket: Ticket) -> Lease:
        """Wait for a slot on one of the ticket's candidates. Cancelling the wait takes the ticket out.

        Raises RateLimitExceeded, InsufficientQuota, TenantQueueFull, Overloaded (no room to wait, or no hope before
        the deadline), QueueTimeout (waited too long), NoHealthyWorker, DependencyUnavailable.
        """

    def set_slots(self, worker_id: str, slots: int, *, is_served: bool | None = None, limit: int | None = None) -> None:
        """`worker_id` has `slots` from now on; 0 while it must get no new work.

        `is_served` tells whether tickets may wait for it with all their patience: by default when it has slots, and
        also while a worker that is full for the moment has none. `limit` is what an adaptive worker was found to be
        worth: of several gateways' limits one counts, whatever slots the others see.
        """
