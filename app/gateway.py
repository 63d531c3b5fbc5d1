"""The life of one request."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
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
        with ExitStack() as held:
            account = held.enter_context(self._accounts.open(request))
            variants = self._catalogue.resolve(request.model, request.tenant)
            request.resolved_model = variants[0].model
            ranking = self._router.rank(self._registry.pool(variants), request)
            candidates = self._relay.screen(request, ranking.worker_ids)
            lease = await self._admission.admit(Ticket.of(request, candidates))
            held.push(partial(_leave, lease, account))
            self._note(lease, ranking.blocks)
            answer = held.enter_context(await self._relay.open(request, lease, candidates, account))
            held.callback(self._note, lease, ranking.blocks)
            return Reply(answer, lease, self._registry[lease.worker_id].variant, held.pop_all())

    def _note(self, lease: Lease, blocks: Blocks) -> None:
        """Let the router know what is in the cache of the lease's worker; a lease lost on the way has no worker."""
        if blocks and lease.worker_id:
            self._router.sent(self._registry[lease.worker_id], blocks)


def _leave(
    lease: Lease,
    account: Account,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """How a request ends decides what it has cost its tenant."""
    lease.release(account.spent(error))
    if isinstance(error, GatewayError):
        error.allowances = lease.allowances


class Reply:
    """An answer on its way to a client, and everything that is held for it: leave it, once, and all is released.

    In order: the connection to the worker, the slot (which goes to the next ticket), the account.
    """

    __slots__ = ("_held", "answer", "lease", "variant")

    def __init__(self, answer: Answer, lease: Lease, variant: Variant, held: ExitStack) -> None:
        self.answer = answer
        self.lease = lease
        self.variant = variant
        self._held = held

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)
