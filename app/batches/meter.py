"""What lines leave room by: the slots of a model's workers, who waits for them, and how interactive streams begin."""

from __future__ import annotations

from collections.abc import Callable, Set
from math import ceil

from app.admission.fairness import RANK
from app.admission.roster import US, QueuedAdmission
from app.batches.slack import Seen
from app.catalogue import Catalogue
from app.errors import ModelNotFound
from app.telemetry.account import Ttfts
from app.tenant import Band
from app.workers.registry import Registry

IN_VAIN_S = 0.1
"""Who has waited for so long was not helped by the process that it came to."""


class Meter:
    """Looks at the workers of a model."""

    def __init__(
        self,
        catalogue: Catalogue,
        registry: Registry,
        admission: QueuedAdmission,
        ttfts: Ttfts,
        clock: Callable[[], float],
    ) -> None:
        self._catalogue = catalogue
        self._registry = registry
        self._admission = admission
        self._ttfts = ttfts
        self._clock = clock

    async def look(self, name: str) -> Seen:
        """See `slack.Seen`. A model that is not served any more has room: its lines are to be told so."""
        try:
            variants = self._catalogue.resolve(name)
        except ModelNotFound:
            return Seen(slots=1, free=1, interactive=0, waiting=0, lines_waiting=0, ttft_s=None)
        pool = {worker.id for worker in self._registry.pool(variants)}
        overview = await self._admission.overview()
        flows = [flow for flow in overview.flows if not pool.isdisjoint(flow.candidates)]
        return Seen(
            slots=sum(slots for worker_id, _, slots in overview.slots if worker_id in pool),
            free=sum(max(0, slots - held) for worker_id, held, slots in overview.slots if worker_id in pool),
            interactive=self._interactive(pool),
            waiting=sum(flow.tickets for flow in flows if flow.band < RANK[Band.BATCH]),
            lines_waiting=sum(flow.tickets for flow in flows if flow.band >= RANK[Band.BATCH]),
            ttft_s=self._ttfts.recent(variants[0].model, self._clock()),
        )

    def interactive(self, name: str) -> int:
        """How many slots of the model this process' interactive requests hold or wait for now."""
        return self._interactive(self._pool(name))

    async def give_way(self, name: str) -> int:
        """Take lines off workers for those who have waited in vain, here or elsewhere; how many.

        For its own a process makes room when they begin to wait. This is for those whose process has no line to take,
        and for those who were overtaken.
        """
        pool, admission = self._pool(name), self._admission
        if not admission.roster.preemptible:
            return 0
        flows = [
            flow
            for flow in (await admission.overview()).flows
            if flow.band < RANK[Band.BATCH]
            and flow.oldest_us >= IN_VAIN_S * US
            and not pool.isdisjoint(flow.candidates)
        ]
        workers = {worker_id for flow in flows for worker_id in flow.candidates}
        # The others see the same: each does its part.
        return admission.roster.preempt(workers, ceil(sum(flow.tickets for flow in flows) / admission.processes))

    def _pool(self, name: str) -> Set[str]:
        try:
            return {worker.id for worker in self._registry.pool(self._catalogue.resolve(name))}
        except ModelNotFound:
            return frozenset()

    def _interactive(self, pool: Set[str]) -> int:
        roster = self._admission.roster
        holding = sum(lease.worker_id in pool and lease.ticket.band is not Band.BATCH for lease in roster.held.values())
        return holding + sum(
            lease.ticket.band is not Band.BATCH and not pool.isdisjoint(lease.ticket.candidates)
            for lease in roster.waiting.values()
        )
