"""What is served: models, their variants, and the workers of those."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from app.settings.network import WorkerTls
from app.settings.part import DNS_NAME, NAME, VARIANT_NAME, Moment, Part, PolicyName


class Worker(Part):
    """A vLLM server that runs already, by its `url`; or all those that one `dns` name stands for."""

    url: str = Field("", description="`http://HOST:PORT` or `https://HOST:PORT`")
    dns: str | None = Field(
        None, description="NAME:PORT; each address of the name is a worker, asked for again and again"
    )
    served_model: str | None = Field(None, description="the name vLLM knows the model by; default: `model:variant`")
    max_concurrency: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"] = Field(
        64, description="slots: requests this worker holds at once; `auto`: as many as its throughput gains from"
    )
    max_num_seqs: int = Field(256, ge=1, le=65536, description="vLLM's own flag: the most that `auto` tries")
    tls: WorkerTls | None = Field(None, description="default for https: the system's authorities")
    api_key_file: Path | None = Field(None, description="holds what the worker was given as --api-key")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$", description="or the environment variable that holds it"
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if not url:
            return url
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https")
        if not is_http or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
            raise ValueError("a worker's url is http://HOST:PORT or https://HOST:PORT")
        return url.rstrip("/")

    @field_validator("dns")
    @classmethod
    def _is_a_name(cls, dns: str | None) -> str | None:
        if dns is not None and not (DNS_NAME.match(dns) and 0 < int(dns.rpartition(":")[2]) < 65536):
            raise ValueError("a worker's dns is NAME:PORT")
        return dns

    @property
    def most_slots(self) -> int:
        return self.max_num_seqs if self.max_concurrency == "auto" else self.max_concurrency

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if bool(self.url) == bool(self.dns):
            raise ValueError("a worker has a url, or a dns name")
        if self.tls is not None and self.url and not self.url.startswith("https://"):
            raise ValueError("tls needs a url with https")
        if self.api_key_file is not None and self.api_key_env is not None:
            raise ValueError("api_key_file and api_key_env exclude each other")
        return self

    @property
    def authority(self) -> str:
        """HOST:PORT as written, by which the worker is known."""
        return self.url.partition("://")[2]


class Variant(Part):
    """One form of a model; its workers are interchangeable."""

    name: str = Field(description="pinned as `model:name`")
    workers: tuple[Worker, ...] = ()
    workers_file: Path | None = Field(None, description="more of them: a YAML or JSON list, read again when it changes")
    quantization: str | None = Field(None, description="shown in `/v1/models`; left out: as its manifest says")
    manifest: Path | None = Field(None, description="its `manifest.json`; its card stands beside it")
    quality: float | None = Field(None, ge=0, le=1, description="of the best variant's; left out: as its card says")
    cost: float | None = Field(
        None, gt=0, description="per token, in any unit that the model's variants share; left out: as its card says"
    )
    ttft_s: float | None = Field(None, gt=0, description="without a queue; left out: as its card says")

    @field_validator("name")
    @classmethod
    def _is_variant_name(cls, name: str) -> str:
        if not VARIANT_NAME.match(name):
            raise ValueError("a variant's name has letters, digits and . _ + - only")
        return name

    @model_validator(mode="after")
    def _has_workers(self) -> Self:
        if not self.workers and self.workers_file is None:
            raise ValueError("a variant needs workers, or a workers_file")
        return self


class QualityGate(Part):
    """What a variant must have kept of its dense sibling, by its card, to take traffic that did not ask for it by name.

    One that fails can still be pinned: `model:variant`. A threshold that is null is not looked at.
    """

    min_quality: float | None = Field(0.5, ge=0, le=1, description="relative quality, 1 is the dense sibling's")
    max_kl: float | None = Field(None, ge=0, description="divergence from the dense sibling, nats per token")
    min_top1: float | None = Field(None, ge=0, le=1, description="share of tokens with the same most probable one")
    max_perplexity_ratio: float | None = Field(None, ge=0, description="perplexity by the dense sibling's")
    min_task_share: float | None = Field(None, ge=0, le=1, description="of each task's score, by the dense sibling's")
    require_card: bool = Field(False, description="a variant that was never measured fails, too")


class Lifetime(Part):
    """How long a name is there. Answers say so in `deprecation` and `sunset` headers (RFC 9745, RFC 8594)."""

    deprecated: Moment | None = Field(None, description="from then on it should not be used any more")
    sunset: Moment | None = Field(None, description="from then on it is not found")

    @model_validator(mode="after")
    def _ends_after_it_is_deprecated(self) -> Self:
        if self.deprecated and self.sunset and self.sunset < self.deprecated:
            raise ValueError("sunset is before deprecated")
        return self


class Alias(Lifetime):
    """Another name of a model, or of one of its variants."""

    name: str = Field(pattern=NAME.pattern, description="a name of no other model")
    variant: str | None = Field(None, description="the one that this name pins")


class Canary(Part):
    """A variant that gets a share of a model's requests, and no others but those that name it."""

    variant: str = Field(description="one of the model's")
    percent: float = Field(ge=0, le=100, description="of sessions, else users, else tenants: each keeps its side")


class Shadow(Part):
    """A variant that gets copies of requests, whose answers are compared and never returned."""

    variant: str = Field(description="one of the model's")
    percent: float = Field(1, ge=0, le=100, description="of the requests that other variants answer")
    concurrency: int = Field(
        1, ge=1, le=64, description="copies under way, in each process; what comes then is dropped"
    )


class Cascade(Part):
    """A small variant that answers first, and a large one that answers where the small one is not sure.

    The threshold comes from the small one's card: the highest by which the cascade keeps `quality`.
    """

    small: str = Field(description="the variant that answers first")
    large: str = Field(description="the variant that answers where the small one is not sure")
    quality: float = Field(0.97, ge=0, le=1, description="of the large one's, to be kept")
    threshold: float | None = Field(None, ge=0, description="uncertainty above which the large one answers")
    measure: Literal["entropy", "margin"] = Field(
        "entropy", description="how unsure: of each token, or by its lead over the next one"
    )
    window_tokens: int = Field(8, ge=1, le=64, description="mean over so many tokens in a row; not used with a card")
    hold_tokens: int = Field(16, ge=1, le=256, description="of a stream, held back until they are known to be sure")

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.small == self.large:
            raise ValueError("small and large are the same variant")
        return self


class Choosing(Lifetime):
    """Which of a model's variants serves a request that names none of them.

    `quality`: the best one, or with a TTFT to keep the best of those that keep it; `economy`: the cheapest; `balanced`:
    the one with the most quality - λ x cost, cost 1 being the dearest variant's; equals share. `any`: all variants,
    the least loaded worker; `pinned`: the one that is listed first; `cascade`: see there. What was never measured has
    quality 0 and cost 1.
    """

    policy: PolicyName = Field("balanced", description="see above")
    cost_weight: float = Field(0.25, ge=0, le=100, description="λ of `balanced`")
    quality_floor: float = Field(0, ge=0, le=1, description="variants below it serve only who names them")
    ttft_target_s: float = Field(
        1, gt=0, le=3600, description="requests whose tenant consents to `degrade` step down rather than wait longer"
    )
    calm_s: float = Field(5, gt=0, le=3600, description="without pressure, before requests step up again")
    canary: Canary | None = None
    cascade: Cascade | None = None
    shadow: Shadow | None = None
    fallbacks: tuple[str, ...] = Field((), max_length=8, description="models that serve while this one has no worker")
    aliases: tuple[Alias, ...] = ()

    @field_validator("aliases", mode="before")
    @classmethod
    def _names_are_aliases(cls, aliases: Any) -> Any:
        is_list = isinstance(aliases, list | tuple)
        return [{"name": alias} if isinstance(alias, str) else alias for alias in aliases] if is_list else aliases


class Model(Choosing):
    """What clients ask for by `name`; `name:variant` pins one variant."""

    name: str = Field(description="what clients ask for")
    resume: bool = Field(False, description="go on with a broken plain-text stream on another worker of its variant")
    quality_gate: QualityGate = QualityGate()
    variants: tuple[Variant, ...] = Field(min_length=1)

    @field_validator("name")
    @classmethod
    def _is_model_name(cls, name: str) -> str:
        if not NAME.match(name):
            raise ValueError("a model's name has letters, digits and . _ / - only")
        return name

    @model_validator(mode="after")
    def _variants_differ(self) -> Model:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"model {self.name!r} lists a variant twice")
        named = [alias.variant for alias in self.aliases if alias.variant]
        if self.canary:
            named.append(self.canary.variant)
        if self.shadow:
            named.append(self.shadow.variant)
        if self.cascade:
            named += [self.cascade.small, self.cascade.large]
        elif self.policy == "cascade":
            raise ValueError(f"model {self.name!r} has the policy cascade and no cascade")
        if unknown := [name for name in named if name not in names]:
            raise ValueError(f"model {self.name!r} has no variant {unknown[0]!r}")
        if self.canary and len(names) == 1:
            raise ValueError(f"model {self.name!r} has no variant beside its canary")
        return self
