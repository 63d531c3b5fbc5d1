"""The life of one request."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from app.admission.ticket import Admission, Lease, Ticket
from app.catalogue import Cascade, Variant
from app.errors import GatewayError, NoHealthyWorker, Overloaded, QueueTimeout, TenantQueueFull
from app.inference import InferenceRequest
from app.relay.answer import Answer
from app.relay.relay import Relay
from app.routing.chooser import Chooser
from app.routing.prefix_index import Blocks
from app.routing.router import Router
from app.routing.variant_choice import Choice
from app.shadow import Shadows
from app.telemetry.account import Account, Accounts
from app.workers.registry import Registry

UNDER_PRESSURE = (Overloaded, QueueTimeout, TenantQueueFull, NoHealthyWorker)
"""Refusals for want of room, where another variant may have some."""


class Gateway:
    """Carries requests: choose → rank → admit → relay. Everything a request acquires is released by its Reply."""

    def __init__(
        self,
        chooser: Chooser,
        registry: Registry,
        router: Router,
        admission: Admission,
        relay: Relay,
        accounts: Accounts,
        shadows: Shadows,
        clock: Callable[[], float],
    ) -> None:
        self._chooser = chooser
        self._registry = registry
        self._router = router
        self._admission = admission
        self._relay = relay
        self._accounts = accounts
        self._shadows = shadows
        self._clock = clock

    async def serve(self, request: InferenceRequest) -> Reply:
        """The reply to `request`, open from its first byte on. Raises GatewayError; then nothing is held any more.

        May be cancelled at any await: every release is synchronous, so that none can be interrupted.
        """
        account = self._accounts.open(request)
        lease: Lease | None = None
        try:
            choice = self._chooser.choose(request)
            lease, candidates, blocks = await self._admit(request, choice, account)
            if choice.cascade is None:
                answer = await self._relay.open(request, lease, candidates, account)
                variant = self._registry[lease.worker_id].variant
                account.variant_reason = self._chooser.served(choice, variant)
            else:
                answer, variant = await self._cascade(request, choice, choice.cascade, lease, candidates, account)
        except BaseException as error:
            _release(lease, account, error)
            raise
        if choice.model.choosing.shadow is not None:
            answer = self._shadows.follow(answer, request, choice.model, variant, account)
        return Reply(answer, lease, variant, choice, account, self._note, blocks)

    async def _admit(
        self, request: InferenceRequest, choice: Choice, account: Account
    ) -> tuple[Lease, tuple[str, ...], Blocks]:
        """A slot, the workers to go on with if that is lost, and what the prompt begins with.

        Where there is another step to take, one that would take too long is left for the next.
        """
        waited_s, last = 0.0, len(choice.steps) - 1
        for at, step in enumerate(choice.steps):
            ranking = self._router.rank_pools([self._registry.pool(rung) for rung in step.rungs], request)
            until = request.arrived + step.wait_s
            account.queued()
            try:
                candidates = self._relay.screen(request, ranking.worker_ids)
                lease = await self._admission.admit(Ticket.of(request, candidates, deadline=until, waited_s=waited_s))
            except UNDER_PRESSURE:
                if at == last:
                    raise
                waited_s = self._clock() - request.arrived
                self._chooser.pressed(choice, at)
                continue
            self._note(lease, ranking.blocks)
            return lease, candidates, ranking.blocks
        raise AssertionError("a choice has steps")

    async def _cascade(
        self,
        request: InferenceRequest,
        choice: Choice,
        cascade: Cascade,
        lease: Lease,
        candidates: tuple[str, ...],
        account: Account,
    ) -> tuple[Answer, Variant]:
        """The small variant's answer, or the large one's if that is not sure; on one lease, which moves.

        The tenant pays for the tokens of both, as for one request. Where the large one cannot be had, an answer that
        is whole is better than none.
        """
        answer, doubt = await self._relay.open_doubted(request, lease, candidates, account, cascade)
        if doubt <= cascade.threshold:
            account.variant_reason = self._chooser.served(choice, cascade.small)
            return answer, cascade.small
        answer.close()
        account.set_aside()
        try:
            ranking = self._router.rank(self._registry.pool((cascade.large,)), request)
            larger = self._relay.screen(request, ranking.worker_ids)
            await lease.move(larger)
            better = await self._relay.open(request, lease, larger, account)
        except GatewayError:
            if answer.is_streamed:
                raise
            account.take_back()
            account.variant_reason = self._chooser.served(choice, cascade.small, is_kept=True)
            return answer, cascade.small
        account.variant_reason = self._chooser.served(choice, cascade.large)
        return better, cascade.large

    def refused(self, request: InferenceRequest, error: GatewayError) -> None:
        """`request` was refused with `error` before it could be served: it is counted as all others are."""
        self._accounts.open(request).close(error)

    def _note(self, lease: Lease, blocks: Blocks) -> None:
        """Let the router know what is in the cache of the lease's worker; a lease lost on the way has no worker."""
        if blocks and lease.worker_id:
            self._router.sent(self._registry[lease.worker_id], blocks)


class Reply:
    """An answer on its way to a client, and everything that is held for it: leave it, once, and all is released.

    In order: the connection to the worker, the slot (which goes to the next ticket), the account.
    """

    __slots__ = ("_account", "_blocks", "_note", "answer", "choice", "lease", "variant")

    def __init__(
        self,
        answer: Answer,
        lease: Lease,
        variant: Variant,
        choice: Choice,
        account: Account,
        note: Callable[[Lease, Blocks], None],
        blocks: Blocks,
    ) -> None:
        self.answer = answer
        self.lease = lease
        self.variant = variant
        self.choice = choice
        self._account = account
        self._note = note
        self._blocks = blocks

    @property
    def reason(self) -> str:
        """Why this variant served: see `variant_choice.Reason`."""
        return self._account.variant_reason

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.answer.close()
            self._note(self.lease, self._blocks)
        finally:
            _release(self.lease, self._account, error)


def _release(lease: Lease | None, account: Account, error: BaseException | None) -> None:
    """Give the slot back and close the account of a request that ended in `error`. Never waits.

    How it ends decides what it has cost its tenant.
    """
    try:
        if lease is not None:
            lease.release(account.spent(error))
            if isinstance(error, GatewayError):
                error.allowances = lease.allowances
    finally:
        account.close(error)
