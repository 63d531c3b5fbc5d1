"""The life of one request."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from app.admission.ticket import Admission, Lease, Ticket
from app.catalogue import Catalogue, Variant
from app.errors import GatewayError
from app.inference import InferenceRequest
from app.relay.answer import Answer
from app.relay.relay import Relay
from app.routing.prefix_index import Blocks
from app.routing.router import Router
from app.telemetry.account import Account, Accounts
from app.workers.registry import Registry


class Gateway:
    """Carries requests: resolve → rank → admit → relay. Everything a request acquires is released by its Reply."""

    def __init__(
        self,
        catalogue: Catalogue,
        registry: Registry,
        router: Router,
        admission: Admission,
        relay: Relay,
        accounts: Accounts,
    ) -> None:
        self._catalogue = catalogue
        self._registry = registry
        self._router = router
        self._admission = admission
        self._relay = relay
        self._accounts = accounts

    async def serve(self, request: InferenceRequest) -> Reply:
        """The reply to `request`, open from its first byte on. Raises GatewayError; then nothing is held any more.

        May be cancelled at any await: every release is synchronous, so that none can be interrupted.
        """
        account = self._accounts.open(request)
        lease: Lease | None = None
        try:
            variants = self._catalogue.resolve(request.model, request.tenant)
            request.resolved_model = variants[0].model
            ranking = self._router.rank(self._registry.pool(variants), request)
            candidates = self._relay.screen(request, ranking.worker_ids)
            account.queued()
            lease = await self._admission.admit(Ticket.of(request, candidates))
            self._note(lease, ranking.blocks)
            answer = await self._relay.open(request, lease, candidates, account)
        except BaseException as error:
            _release(lease, account, error)
            raise
        return Reply(answer, lease, self._registry[lease.worker_id].variant, account, self._note, ranking.blocks)

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

    __slots__ = ("_account", "_blocks", "_note", "answer", "lease", "variant")

    def __init__(
        self,
        answer: Answer,
        lease: Lease,
        variant: Variant,
        account: Account,
        note: Callable[[Lease, Blocks], None],
        blocks: Blocks,
    ) -> None:
        self.answer = answer
        self.lease = lease
        self.variant = variant
        self._account = account
        self._note = note
        self._blocks = blocks

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
