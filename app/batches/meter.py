"""What lines leave room by: the slots of a model's workers, who waits for them, and how interactive streams begin."""

from __future__ import annotations

from collections.abc import Callable, Set

from app.admission.fairness import RANK
from app.admission.roster import QueuedAdmission
from app.batches.slack import Seen
from app.catalogue import Catalogue
from app.errors import ModelNotFound
from app.telemetry.account import Ttfts
from app.tenant import Band
from app.workers.registry import Registry


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
        """How many slots of the model this process' interactive requests hold now."""
        try:
            variants = self._catalogue.resolve(name)
        except ModelNotFound:
            return 0
        return self._interactive({worker.id for worker in self._registry.pool(variants)})

    def _interactive(self, pool: Set[str]) -> int:
        leases = self._admission.roster.held.values()
        return sum(lease.worker_id in pool and lease.ticket.band is not Band.BATCH for lease in leases)
