"""From the name that a client asks for to the variants that may serve it: what `variant_choice` decides from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from app.catalogue import Catalogue, Model, Offer, Variant
from app.errors import ModelNotFound
from app.inference import InferenceRequest
from app.preference import Policy
from app.routing.variant_choice import Choice, Ladder, Reason, Rung, Terms, choose, point_of
from app.telemetry.account import Ttfts
from app.telemetry.metrics import Metrics
from app.workers.registry import Registry

FALLBACK_HEADER = b"x-sluice-fallback"
"""Names the model that was asked for, in the answer of another one."""


class Chooser:
    """Chooses among variants, and keeps how far pressure has taken each ladder down: one for each rung at its top."""

    def __init__(
        self,
        catalogue: Catalogue,
        registry: Registry,
        paces: Ttfts,
        metrics: Metrics,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        """`paces` are what variants took of late from dispatch to the first token, by their public names."""
        self._catalogue = catalogue
        self._registry = registry
        self._paces = paces
        self._metrics = metrics
        self._clock = clock
        self._wall = wall
        self._ladders: dict[tuple[str, ...], Ladder] = {}

    def choose(self, request: InferenceRequest) -> Choice:
        """What may serve `request`, whose `resolved_model` is known from now on. Raises ModelNotFound, InvalidValue."""
        offer = self._catalogue.offer(request.model, request.tenant, self._wall())
        request.resolved_model = offer.model.name
        if offer.model.choosing.fallbacks and not offer.is_pinned and not any(map(self.serves, offer.variants)):
            return self._fallback(offer, request) or self._choose(offer, request)
        return self._choose(offer, request)

    def serves(self, variant: Variant) -> bool:
        """See `variant_choice.Outlook`."""
        return any(worker.condition.serves for worker in self._registry.pool((variant,)))

    def ttft_s(self, variant: Variant) -> float:
        """See `variant_choice.Outlook`: of late, else what its card says."""
        recent = self._paces.recent(variant.public_name, self._clock())
        return variant.facts.ttft_s if recent is None else recent

    def level(self, model: Model, ladder: Sequence[Rung]) -> int:
        """See `variant_choice.Outlook`."""
        name = _name(ladder[0])
        before = self._ladders.get(name)
        if before is None:
            return 0
        now = self._ladders[name] = before.at(self._clock(), model.choosing.calm_s)
        if now.level < before.level < len(ladder):
            self._count_step(ladder[before.level], ladder[now.level], "calm")
        return now.level

    def pressed(self, choice: Choice, step: int) -> None:
        """No slot came in time at this step of `choice`, and there is another."""
        rungs = choice.steps[step + 1].rungs
        now, calm_s = self._clock(), choice.model.choosing.calm_s
        name = _name(rungs[0])
        ladder = self._ladders.get(name, Ladder())
        pressed = self._ladders[name] = ladder.pressed(len(rungs) - 2, now, calm_s)
        if pressed is not ladder:
            self._count_step(rungs[-2], rungs[-1], "pressure")

    def served(self, choice: Choice, variant: Variant, *, is_kept: bool = False) -> Reason:
        """Why `variant` serves; counted where there was something to choose."""
        reason = Reason.KEPT if is_kept else choice.reason_for(variant)
        if choice.is_decided or reason is Reason.FALLBACK:
            self._metrics.variant_choices.labels(variant.model, variant.name, reason).inc()
        return reason

    def _choose(self, offer: Offer, request: InferenceRequest) -> Choice:
        return choose(offer, lambda: _terms(offer, request), self)

    def _fallback(self, asked: Offer, request: InferenceRequest) -> Choice | None:
        """The first of the model's fallbacks that has a worker, and that the tenant may use."""
        for name in asked.model.choosing.fallbacks:
            try:
                offer = self._catalogue.offer(name, request.tenant, self._wall())
            except ModelNotFound:
                continue
            if any(map(self.serves, offer.variants)):
                request.resolved_model = name
                header = (FALLBACK_HEADER, asked.model.name.encode())
                choice = self._choose(offer, request)
                return replace(choice, reason=Reason.FALLBACK, headers=(*asked.headers, *choice.headers, header))
        return None

    def _count_step(self, before: Rung, after: Rung, reason: str) -> None:
        labels = (before[0].model, before[0].name, after[0].name, reason)
        self._metrics.variant_steps.labels(*labels).inc()


def _terms(offer: Offer, request: InferenceRequest) -> Terms:
    choosing, asked, tenant = offer.model.choosing, request.preference, request.tenant
    if choosing.canary is None:
        return _able(Terms.of(choosing, tenant, asked), request)
    # Nobody in particular is many people: without a word on who asks, each request is on a side of its own.
    session = asked.session or request.user or (request.id if tenant.is_anonymous else "")
    return _able(Terms.of(choosing, tenant, asked, point_of(offer.model.name, tenant.name, session)), request)


def _able(terms: Terms, request: InferenceRequest) -> Terms:
    """An answer that nobody can weigh comes from the best variant at once."""
    if terms.policy is Policy.CASCADE and not request.weighs_tokens:
        return replace(terms, policy=Policy.QUALITY)
    return terms


def _name(rung: Rung) -> tuple[str, ...]:
    return tuple([variant.public_name for variant in rung])
