"""What a public name resolves to: models, their variants, and what is known of each.

`smollm2` means any variant of the model that passes its quality gate, `smollm2:w8a8` pins one; an alias is another name
of either. What is in a catalogue is immutable; a reload builds another, and the one that everybody holds adopts its
content in a single step.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC
from email.utils import format_datetime
from math import inf

from app import settings
from app.card import Card, Uncertainty, UncertaintyStep, gate
from app.credentials import TlsContexts, read_secret
from app.errors import ConfigurationError, ModelNotFound
from app.manifest import Manifest
from app.tenant import ANONYMOUS, Tenant
from app.uncertainty import TOP_LOGPROBS

SHOWN_NAME_CHARS = 200


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker of a variant listens, what it calls the model, and how many slots it has, at most if it adapts.

    `tls` is None for plain HTTP. `api_key` is the worker's own and goes nowhere else; empty for none.
    """

    id: str
    host: str
    port: int
    served_model: str
    slots: int
    adapts: bool = False
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    server_name: str | None = None
    api_key: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://{self.id}"


@dataclass(frozen=True, slots=True)
class VariantFacts:
    """What is known of a variant beside its model's others: quality 0..1, cost per token by the dearest one's.

    What was never measured has quality 0 and cost 1: it is equal to others like it, and worse than what is known.
    `ttft_s` is what its worker takes without a queue, 0 if nobody knows. Only by its name can a variant be asked for
    that does not pass the quality gate.
    """

    quality: float = 0.0
    cost: float = 1.0
    ttft_s: float = 0.0
    passes_gate: bool = True


@dataclass(frozen=True, slots=True)
class Variant:
    """One form of a model, with the workers of its pool. `resumes`: its broken streams may go on on another of them."""

    model: str
    name: str
    workers: tuple[WorkerAddress, ...]
    quantization: str | None = None
    context_length: int | None = None
    card: Card | None = None
    resumes: bool = False
    facts: VariantFacts = VariantFacts()

    @property
    def public_name(self) -> str:
        return f"{self.model}:{self.name}"


@dataclass(frozen=True, slots=True)
class Cascade:
    """A small variant answers first; where it is less sure than `threshold`, as `calibrated` measures, a large one.

    Of a stream the first `hold_tokens` decide.
    """

    small: Variant
    large: Variant
    calibrated: Uncertainty
    threshold: float
    hold_tokens: int


@dataclass(frozen=True, slots=True)
class Model:
    """What clients ask for; the order of its variants is the operator's preference."""

    name: str
    variants: tuple[Variant, ...]
    choosing: settings.Choosing = field(default_factory=settings.Choosing)
    cascade: Cascade | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a public name stands for: a model, and those of its variants that may serve who asks for it.

    `headers` announce the end of the name, and it is not found from `sunset` on, seconds since the epoch.
    """

    model: Model
    variants: tuple[Variant, ...]
    is_pinned: bool
    headers: tuple[tuple[bytes, bytes], ...] = ()
    sunset: float = inf


class Catalogue:
    """Every public name and what stands behind it."""

    def __init__(self, models: tuple[Model, ...]) -> None:
        self.models = models
        self._by_name = {name: offer for model in models for name, offer in _offers(model)}

    @classmethod
    def of(cls, configured: tuple[settings.Model, ...]) -> Catalogue:
        """The catalogue of a configuration.

        Raises ConfigurationError for a manifest, certificate or key that cannot be read.
        """
        contexts = TlsContexts()
        return cls(tuple(_model(model, contexts) for model in configured))

    def adopt(self, other: Catalogue) -> None:
        """Have the content of `other`. Requests under way keep the variants that they were given."""
        vars(self).update(vars(other))

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(variant for model in self.models for variant in model.variants)

    def offer(self, name: str, tenant: Tenant = ANONYMOUS, now: float = 0.0) -> Offer:
        """What `name` stands for, for `tenant`, at `now`, seconds since the epoch.

        Raises ModelNotFound: what a tenant may not use does not exist for it, nor what has passed its sunset.
        """
        found = self._by_name.get(name)
        if found is not None and tenant.models is not None:
            allowed = tuple(variant for variant in found.variants if tenant.may_use(variant.model, variant.name))
            found = replace(found, variants=allowed) if allowed else None
        if found is None or now >= found.sunset:
            shown = name[:SHOWN_NAME_CHARS]
            raise ModelNotFound(f"The model {shown!r} does not exist or you do not have access to it.", param="model")
        return found

    def resolve(self, name: str, tenant: Tenant = ANONYMOUS) -> tuple[Variant, ...]:
        """The variants that may serve `name` to `tenant`, in the operator's order. Raises ModelNotFound."""
        return self.offer(name, tenant).variants


def _offers(model: Model) -> Iterator[tuple[str, Offer]]:
    """All names that lead to `model`."""
    choosing = model.choosing
    passing = tuple(variant for variant in model.variants if variant.facts.passes_gate)
    names: list[tuple[str, settings.Lifetime]] = [(model.name, choosing)]
    for alias in choosing.aliases:
        if alias.variant is None:
            names.append((alias.name, alias))
        else:
            pinned = tuple(variant for variant in model.variants if variant.name == alias.variant)
            yield alias.name, _offer(model, pinned, alias, is_pinned=True)
    for name, lifetime in names:
        yield name, _offer(model, passing, lifetime, is_pinned=False)
        for variant in model.variants:
            yield f"{name}:{variant.name}", _offer(model, (variant,), lifetime, is_pinned=True)


def _offer(model: Model, variants: tuple[Variant, ...], lifetime: settings.Lifetime, *, is_pinned: bool) -> Offer:
    """Dates as RFC 9745 (a structured field's date) and RFC 8594 (an HTTP date) write them."""
    headers = []
    if lifetime.deprecated is not None:
        headers.append((b"deprecation", b"@%d" % lifetime.deprecated.timestamp()))
    if lifetime.sunset is not None:
        headers.append((b"sunset", format_datetime(lifetime.sunset.astimezone(UTC), usegmt=True).encode()))
    sunset = lifetime.sunset.timestamp() if lifetime.sunset else inf
    return Offer(model, variants, is_pinned, tuple(headers), sunset)


def _model(configured: settings.Model, contexts: TlsContexts) -> Model:
    measured = [(variant, _manifest(variant)) for variant in configured.variants]
    dearest = max([cost for variant, manifest in measured if (cost := _cost(variant, manifest))], default=1.0)
    variants = tuple(
        _variant(configured, variant, manifest, _facts(configured, variant, manifest, dearest), contexts)
        for variant, manifest in measured
    )
    return Model(configured.name, variants, configured, _cascade(configured, variants, dict(measured)))


def _cascade(
    model: settings.Model, variants: tuple[Variant, ...], measured: dict[settings.Variant, Manifest | None]
) -> Cascade | None:
    """Raises ConfigurationError where nobody says from when on an answer is unsure."""
    asked = model.cascade
    if asked is None:
        return None
    named = {variant.name: variant for variant in variants}
    small, large = named[asked.small], named[asked.large]
    calibrated, threshold = _given_threshold(asked), asked.threshold
    manifest = next(manifest for variant, manifest in measured.items() if variant.name == asked.small)
    if threshold is None and manifest is not None and manifest.card is not None:
        cards = [one for one in manifest.card.uncertainty if one.measure == asked.measure]
        calibrated, threshold = (cards[0], threshold_of(cards[0], asked.quality)) if cards else (calibrated, None)
    if threshold is None:
        raise ConfigurationError(
            f"models.{model.name}.cascade: no threshold, and no card says how unsure {asked.small!r} may be"
        )
    return Cascade(small, large, calibrated, threshold, asked.hold_tokens)


def threshold_of(calibrated: Uncertainty, quality: float) -> float:
    """The highest threshold by which a cascade keeps `quality`; below all of them, where none does."""
    kept = [step.threshold for step in calibrated.table if step.expected_quality >= quality]
    return max(kept, default=0.0)


def _given_threshold(asked: settings.Cascade) -> Uncertainty:
    step = UncertaintyStep(threshold=asked.threshold or 0.0, escalated_share=0, expected_quality=0, agreement=0)
    return Uncertainty(
        measure=asked.measure, window_tokens=asked.window_tokens, top_logprobs=TOP_LOGPROBS, items=1, table=(step,)
    )


def _cost(configured: settings.Variant, manifest: Manifest | None) -> float | None:
    card = manifest.card if manifest else None
    return configured.cost or (card.cost.per_million_tokens if card and card.cost else None)


def _facts(
    model: settings.Model, configured: settings.Variant, manifest: Manifest | None, dearest: float
) -> VariantFacts:
    """What the configuration says counts before what the card says."""
    card = manifest.card if manifest else None
    cost = _cost(configured, manifest)
    quality = configured.quality if configured.quality is not None or card is None else card.relative_quality
    return VariantFacts(
        quality=quality or 0.0,
        cost=cost / dearest if cost else 1.0,
        ttft_s=configured.ttft_s or (card.speed[0].ttft_p50_s if card and card.speed else 0.0),
        passes_gate=gate(card, model.quality_gate).passed,
    )


def _variant(
    model: settings.Model,
    configured: settings.Variant,
    manifest: Manifest | None,
    facts: VariantFacts,
    contexts: TlsContexts,
) -> Variant:
    return Variant(
        model=model.name,
        name=configured.name,
        workers=tuple(_worker(f"{model.name}:{configured.name}", worker, contexts) for worker in configured.workers),
        quantization=configured.quantization or (manifest.quantization if manifest else None),
        context_length=manifest.context_length if manifest else None,
        card=manifest.card if manifest else None,
        resumes=model.resume,
        facts=facts,
    )


def _manifest(configured: settings.Variant) -> Manifest | None:
    return Manifest.read_checked(configured.manifest.parent) if configured.manifest else None


def _worker(public_name: str, configured: settings.Worker, contexts: TlsContexts) -> WorkerAddress:
    authority, is_tls = configured.authority, configured.url.startswith("https://")
    default_port = "443" if is_tls else "80"
    host, _, port = authority.rpartition(":") if ":" in authority.rpartition("]")[2] else (authority, "", default_port)
    tls = configured.tls or settings.WorkerTls()
    return WorkerAddress(
        id=authority,
        host=host.strip("[]"),
        port=int(port),
        served_model=configured.served_model or public_name,
        slots=configured.most_slots,
        adapts=configured.max_concurrency == "auto",
        tls=contexts.of(tls) if is_tls else None,
        server_name=tls.server_name,
        api_key=read_secret(configured.api_key_file, configured.api_key_env),
    )
