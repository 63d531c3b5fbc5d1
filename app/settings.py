"""Settings: one YAML file, single values overridden by `SLUICE_…` environment variables.

Frozen and nested, one part per package, units in the names. `SLUICE_LISTEN__PORT=9000` overrides `listen.port`.
An unknown key is an error: a limit that is misspelt must not silently be absent.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.errors import ConfigurationError

CONFIG_FILE_MAX_BYTES = 4 * 1024 * 1024
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$")
DNS_NAME = re.compile(r"^[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?:[0-9]{1,5}$")
TENANT_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
VARIANT_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")


BandName = Literal["priority", "default", "flex", "batch"]
PolicyName = Literal["quality", "economy", "balanced", "any", "pinned", "cascade"]


def _aware(moment: datetime) -> datetime:
    """A date, or a time without a zone, is UTC."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Moment = Annotated[datetime, AfterValidator(_aware)]


class Part(BaseModel):
    """A part of the settings: immutable, and strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Listen(Part):
    """Where clients connect. `processes` share one socket."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    processes: int = Field(1, ge=1, le=64)


class Admin(Part):
    """A listener of its own for `/metrics`, `/docs` and `/admin`; the public one then answers 404 for them."""

    host: str = "127.0.0.1"
    port: int = Field(8001, ge=0, le=65535)


class Tls(Part):
    """TLS towards a server. Its certificate is verified always, and nothing older than TLS 1.2 is spoken."""

    ca_file: Path | None = Field(None, description="whom to trust (PEM), instead of the system's authorities")
    cert_file: Path | None = Field(None, description="the gateway's own certificate, for servers that ask (mTLS)")
    key_file: Path | None = Field(None, description="of cert_file; default: in the same file")
    verify: Literal["full", "chain"] = Field(
        "full", description="`chain`: the certificate may be for any name; only with a ca_file of one's own"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("a key_file needs a cert_file")
        if self.verify == "chain" and self.ca_file is None:
            raise ValueError("verify: chain needs a ca_file: public authorities certify anybody")
        return self


class WorkerTls(Tls):
    """TLS towards a worker."""

    server_name: str | None = Field(
        None, min_length=1, max_length=253, description="asked for by SNI and expected; default: the url's host"
    )


class Redis(Part):
    """The server that all gateway processes share. Left out, each process admits on its own."""

    url: str = Field("redis://127.0.0.1:6379/0", description="`rediss://` for TLS; `USER@` before the host")
    password_file: Path | None = Field(None, description="holds the password, which is better not in the url")
    tls: Tls | None = Field(None, description="default for rediss: the system's authorities")
    prefix: str = Field("sluice", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="of all keys; one per fleet")
    allow_eviction: bool = Field(False, description="start although the server may evict keys, leases among them")

    @model_validator(mode="after")
    def _has_one_password(self) -> Self:
        if self.password_file is not None and urlsplit(self.url).password is not None:
            raise ValueError("a password in url and password_file are both given")
        return self


class Auth(Part):
    """API keys: from files, and from Redis where there is one.

    `secret` is what digests of keys and cache salts are made with, the same on all replicas; better in a file or in
    the environment (`SLUICE_AUTH__SECRET`) than in the configuration. Another secret makes all keys unknown.
    """

    enabled: bool | None = Field(None, description="left out: unless all listeners are on loopback")
    key_files: tuple[Path, ...] = ()
    secret: SecretStr | None = None
    secret_file: Path | None = None
    stale_s: float = Field(86_400, ge=0, description="how long known keys work while their store is out of reach")
    failures_per_min: int = Field(120, ge=1, le=1_000_000, description="wrong keys of one address, before it gets 429")

    @model_validator(mode="after")
    def _has_one_secret(self) -> Auth:
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("secret and secret_file are both given")
        return self


class TenantLimits(Part):
    """What a tenant may use, over all replicas; left out, there is no limit."""

    requests_per_min: int | None = Field(None, ge=1)
    tokens_per_min: int | None = Field(None, ge=1, description="input and output together")
    input_tokens_per_min: int | None = Field(None, ge=1)
    output_tokens_per_min: int | None = Field(None, ge=1)
    tokens_per_day: int | None = Field(None, ge=1, description="input and output together")
    concurrent: int | None = Field(None, ge=1, description="requests that wait or run at once")


class TenantTerms(Part):
    """What a tenant gets."""

    weight: float = Field(1, gt=0, le=1_000_000, description="its share beside other tenants'")
    ceiling: BandName = Field("priority", description="the highest band it gets, whatever `service_tier` asks for")
    models: frozenset[str] | None = Field(
        None, description="models (`m`) and variants (`m:v`) that it may use; left out: all"
    )
    limits: TenantLimits = TenantLimits()
    max_tokens: int | None = Field(None, ge=1, description="the most that one request may ask for")
    engine_fields: bool = Field(False, description="pass fields on that steer the engine itself")
    resume: bool | None = Field(
        None, description="go on with a broken stream on another worker; left out: as its model says"
    )
    degrade: bool = Field(False, description="may be served by a lesser variant under pressure")
    policy: PolicyName | None = Field(None, description="among a model's variants; left out: as the model says")


class Tenant(TenantTerms):
    """Who pays."""

    name: str

    @field_validator("name")
    @classmethod
    def _is_tenant_name(cls, name: str) -> str:
        if not TENANT_NAME.match(name):
            raise ValueError("a tenant's name has letters, digits and . _ - only, 64 at most")
        return name


class Worker(Part):
    """A vLLM server that runs already, by its `url`; or all those that one `dns` name stands for."""

    url: str = ""
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

    name: str
    workers: tuple[Worker, ...] = ()
    workers_file: Path | None = Field(None, description="more of them: a YAML or JSON list, read again when it changes")
    quantization: str | None = None
    manifest: Path | None = None
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

    name: str = Field(pattern=NAME.pattern)
    variant: str | None = Field(None, description="the one that this name pins")


class Canary(Part):
    """A variant that gets a share of a model's requests, and no others but those that name it."""

    variant: str
    percent: float = Field(ge=0, le=100, description="of sessions, else users, else tenants: each keeps its side")


class Shadow(Part):
    """A variant that gets copies of requests, whose answers are compared and never returned."""

    variant: str
    percent: float = Field(1, ge=0, le=100, description="of the requests that other variants answer")
    concurrency: int = Field(
        1, ge=1, le=64, description="copies under way, in each process; what comes then is dropped"
    )


class Cascade(Part):
    """A small variant that answers first, and a large one that answers where the small one is not sure.

    The threshold comes from the small one's card: the highest by which the cascade keeps `quality`.
    """

    small: str
    large: str
    quality: float = Field(0.97, ge=0, le=1, description="of the large one's, to be kept")
    threshold: float | None = Field(None, ge=0, description="uncertainty above which the large one answers")
    measure: Literal["entropy", "margin"] = "entropy"
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

    policy: PolicyName = "balanced"
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

    name: str
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


class Admission(Part):
    """Who waits, how long, and in which order. Limits hold across all replicas that share a Redis.

    By default there is room for every band to be full, so none crowds out another, and four tenants fill a band.
    """

    queue_limit: int = Field(16_000, ge=0, description="requests that may wait, in all")
    queue_limit_per_band: int = Field(4000, ge=0)
    queue_limit_per_tenant: int = Field(1000, ge=0)
    queue_mib: int = Field(1024, ge=1, description="bodies of requests that wait, in all")
    queue_mib_per_band: int = Field(256, ge=1)
    queue_mib_per_tenant: int = Field(64, ge=1)
    queue_timeout_s: float = Field(30, gt=0, le=3600, description="longest wait for a slot")
    queue_timeout_by_band_s: dict[BandName, PositiveFloat] = Field(
        {"flex": 300.0, "batch": 3600.0}, description="where it differs"
    )
    no_worker_timeout_s: float = Field(3, ge=0, le=60, description="longest wait while no worker is usable at all")
    ageing_s: float = Field(10, gt=0, le=3600, description="each so many seconds of waiting lift a ticket by one band")
    order_s_per_token: float = Field(
        0.01,
        ge=0,
        le=10,
        description="order in a tenant's flow: shortest first, each predicted token like so much later an arrival;"
        " 0 is by arrival",
    )
    lease_s: float = Field(15, gt=0, le=300, description="a lease of a replica that fell silent ends after this")
    replicas: int = Field(
        1,
        ge=1,
        le=1000,
        description="gateway replicas at least; the ledger counts those that live. Without Redis each uses its part",
    )
    without_redis: Literal["local", "refuse"] = Field(
        "local", description="while Redis is gone: serve a static share, or answer 503"
    )
    trust_tenant_header: bool = Field(
        False, description="take the tenant from `x-sluice-tenant`; only behind a proxy that sets it"
    )

    def max_wait_s(self, band: str) -> float:
        return dict[str, float](**self.queue_timeout_by_band_s).get(band, self.queue_timeout_s)


class Routing(Part):
    """Which of a pool's workers a request goes to.

    `prefix`: the one that has most of the prompt cached, unless it has more than its share of the load or another is
    much less loaded. `least_loaded` and `round_robin` do not look at prompts.
    """

    policy: Literal["prefix", "least_loaded", "round_robin"] = "prefix"
    load_bound: float = Field(
        1.5, ge=1, le=100, description="a worker beyond this many times the mean load is not preferred for its cache"
    )
    block_bytes: int = Field(
        128, ge=16, le=65536, description="of prompt under one hash; about the worker's block_size x bytes_per_token"
    )
    bytes_per_token: float = Field(4.0, gt=0, le=64, description="of a prompt's JSON, on average")
    kv_cache_tokens: int = Field(
        65536, ge=1, description="capacity of a worker's prefix cache, for workers whose metrics don't tell"
    )


class Relay(Part):
    """Limits of one exchange with a worker."""

    connect_timeout_s: float = Field(2, gt=0, le=60)
    first_byte_timeout_s: float = Field(120, gt=0, le=3600, description="from dispatch to the worker's first body byte")
    gap_timeout_s: float = Field(60, gt=0, le=3600, description="longest silence inside a stream")
    total_timeout_s: float = Field(3600, gt=0, le=86400)
    client_stall_timeout_s: float = Field(30, gt=0, le=3600, description="longest time a client may not read")
    idle_connections_per_worker: int = Field(256, ge=0, le=65536)
    keepalive_s: float = Field(4, gt=0, le=300, description="below the worker's own keep-alive, vLLM's default is 5 s")
    stalled_gap_timeout_s: float = Field(
        10, gt=0, le=3600, description="longest silence inside a stream of a worker that stalls"
    )
    retry_share: float = Field(0.2, ge=0, le=1, description="second attempts, as a share of a pool's requests")
    retries_per_s: float = Field(10, ge=0, le=1000, description="second attempts of a pool that are free of that share")
    failures_until_ejected: int = Field(3, ge=1, le=100, description="failed attempts in a row")
    ejection_s: float = Field(10, gt=0, le=3600, description="the first; each one that follows soon is twice as long")
    ejection_max_s: float = Field(300, gt=0, le=86400)
    rest_max_s: float = Field(10, gt=0, le=300, description="longest rest of a worker that says it is full")
    quarantine_s: float = Field(600, gt=0, le=86400, description="how long a request that kills workers is refused")
    resumes_per_stream: int = Field(1, ge=0, le=4, description="times that one stream of a resumable model may go on")
    resume_max_tokens: int = Field(
        32_768, ge=1, le=1_048_576, description="prompt and answer; longer streams are not resumed (4 bytes a token)"
    )


class Limits(Part):
    """Bounds on what a client may send, as HTTP."""

    header_timeout_s: float = Field(10, gt=0, le=600, description="from the first byte to the last header's end")
    header_bytes: int = Field(32 * 1024, ge=1024, description="all headers of a request together")
    header_count: int = Field(100, ge=8, le=10_000)
    target_bytes: int = Field(8 * 1024, ge=256, description="the path and the query together")
    body_bytes: int = Field(16 * 1024 * 1024, ge=1024)
    body_timeout_s: float = Field(30, gt=0, le=600, description="from the headers' end to the body's")
    body_grace_s: float = Field(5, ge=0, le=600, description="before the lowest rate of a body counts")
    body_bytes_per_s: float = Field(16 * 1024, gt=0, description="lowest rate of a body, after the grace")


class Structured(Part):
    """Constraints on generation that a client may ask for: the engine compiles them, and some never end."""

    regex: bool = Field(False, description="`structured_outputs.regex`")
    grammar: bool = Field(False, description="`structured_outputs.grammar` and `structural_tag`")
    regex_bytes: int = Field(1024, ge=1)
    schema_depth: int = Field(16, ge=1, le=64)
    schema_nodes: int = Field(1000, ge=1, description="objects and lists of one JSON schema")


class Media(Part):
    """Images, sound and video inside messages, as `data:` URLs only: no server here fetches a client's address."""

    kinds: frozenset[Literal["image", "audio", "video"]] = frozenset({"image"})
    items: int = Field(16, ge=0, description="in one request")
    item_bytes: int = Field(20 * 1024 * 1024, ge=1, description="of one, decoded from base64")
    image_pixels: int = Field(50_000_000, ge=1, description="width times height, as a PNG or GIF declares it")


class Parameters(Part):
    """Bounds on what a request may ask for."""

    choices: int = Field(16, ge=1, le=16_384, description="`n`")
    prompts: int = Field(128, ge=1, description="prompts of one text completion")
    inputs: int = Field(2048, ge=1, description="texts of one embedding, rerank or score request")
    messages: int = Field(2048, ge=1)
    tools: int = Field(512, ge=1)
    structured: Structured = Structured()
    media: Media = Media()


class Health(Part):
    """How workers are watched."""

    probe_interval_s: float = Field(2, gt=0, le=60)
    probe_timeout_s: float = Field(1, gt=0, le=60)
    probe_misses: int = Field(3, ge=1, le=100, description="failed probes in a row before a worker is left")
    canary_timeout_s: float = Field(60, gt=0, le=600, description="longest wait for the one token that proves a worker")
    progress_timeout_s: float = Field(
        30, gt=0, le=3600, description="a worker at work that is silent for so long is asked for a token"
    )
    progress_canary_timeout_s: float = Field(10, gt=0, le=600, description="longest wait for that token")
    slow_start_s: float = Field(10, ge=0, le=600, description="a worker that returns has all its slots after this time")
    kv_usage_max: float = Field(0.95, gt=0, le=1, description="share of the KV cache above which no new work is sent")


class Bucket(Part):
    """Object storage that speaks S3. Credentials come from the environment or the machine's role, as AWS's tools do."""

    name: str
    prefix: str = Field("", description="of all keys")
    endpoint: str | None = Field(None, description="of another provider than AWS; http:// only on a trusted network")
    region: str | None = None


class Batches(Part):
    """Files and the Batch API. Several gateways share them through Redis and the same directory or bucket."""

    directory: Path | None = Field(None, description="where they are kept; without it and a bucket there are none")
    bucket: Bucket | None = Field(None, description="keep them there instead")
    lines: int = Field(50_000, ge=1, le=1_000_000, description="requests of one batch")
    file_bytes: int = Field(200 * 1024 * 1024, ge=1)
    line_bytes: int = Field(1024 * 1024, ge=1)
    range_lines: int = Field(128, ge=1, le=1000, description="lines that one gateway claims together")
    range_bytes: int = Field(4 * 1024 * 1024, ge=1, description="no more of the input are claimed together")
    files_kept_s: int = Field(30 * 86400, ge=60, description="for files without a date of their own")
    batches_kept_s: int = Field(30 * 86400, ge=60, description="what is told of a batch, after it ended")
    keys_kept_s: int = Field(86400, ge=60, description="so long an Idempotency-Key stands for the same batch")
    batches_per_tenant: int = Field(100, ge=1, description="that are not finished")
    lines_in_flight: int = Field(256, ge=1, le=65536, description="of one model, by one gateway process")
    ttft_target_s: float = Field(1.0, gt=0, description="TTFT of interactive streams above which lines give way")
    attempts_per_line: int = Field(3, ge=1, le=100, description="dispatches that broke before a line counts as failed")
    lease_s: float = Field(15, ge=1, le=300, description="a silent gateway's claims end after this")
    tick_s: float = Field(0.5, gt=0, le=60, description="between two looks at what is to do")
    commit_interval_s: float = Field(0.25, ge=0, le=60, description="longest time that a finished line is not stored")


class Reload(Part):
    """How changes are found while the gateway runs: of models, workers and tenants. SIGHUP looks at once."""

    watch_interval_s: float = Field(
        1, ge=0, le=3600, description="between two looks at the files; 0: at a signal only. Two looks must agree"
    )
    dns_interval_s: float = Field(5, gt=0, le=3600, description="between two questions about each worker's dns name")
    dns_timeout_s: float = Field(3, gt=0, le=60)
    workers_per_name: int = Field(256, ge=1, le=4096, description="addresses of one dns name, or of one workers_file")


class Logs(Part):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"
    requests: Literal["all", "failed", "none"] = "failed"


class Tracing(Part):
    """Spans to an OpenTelemetry collector, by OTLP over HTTP; left out, there are none.

    What is left out here is as OpenTelemetry's own environment variables say: `OTEL_EXPORTER_OTLP_…`,
    `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER_ARG`; `OTEL_SDK_DISABLED` goes before all.
    """

    endpoint: str | None = Field(None, description="http://HOST:4318/v1/traces; default: on localhost")
    sample_ratio: float | None = Field(None, ge=0, le=1, description="share of requests that are traced; default: all")
    headers_file: Path | None = Field(None, description="lines `name: value` that the collector asks for")
    service_name: str | None = Field(None, min_length=1, max_length=255, description="default: sluice")
    trust_clients: bool = Field(
        False,
        description="continue the traces of clients, and let them say what is recorded, instead of linking to them",
    )
    queue_spans: int = Field(8192, ge=512, le=1_000_000, description="not exported yet; beyond it the oldest are lost")
    export_interval_s: float = Field(2, gt=0, le=60)
    export_timeout_s: float | None = Field(
        None, gt=0, le=60, description="of an export, tried again or not; default: 10"
    )
    flush_timeout_s: float = Field(3, ge=0, le=60, description="at the end, for what is still queued")

    @field_validator("endpoint")
    @classmethod
    def _is_http(cls, endpoint: str | None) -> str | None:
        parts = urlsplit(endpoint or "http://localhost")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ValueError("an endpoint is http://HOST:PORT/PATH or https://HOST:PORT/PATH")
        return endpoint


class Settings(BaseSettings):
    """The whole configuration of one gateway."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="SLUICE_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    listen: Listen = Listen()
    admin: Admin | None = None
    redis: Redis | None = None
    auth: Auth = Auth()
    models: tuple[Model, ...] = ()
    tenants: tuple[Tenant, ...] = ()
    default_tenant: TenantTerms = Field(TenantTerms(), description="the terms of all whom `tenants` does not name")
    admission: Admission = Admission()
    routing: Routing = Routing()
    relay: Relay = Relay()
    limits: Limits = Limits()
    parameters: Parameters = Parameters()
    health: Health = Health()
    batches: Batches = Batches()
    reload: Reload = Reload()
    logs: Logs = Logs()
    tracing: Tracing | None = None
    drain_notice_s: float = Field(
        5, ge=0, le=600, description="after SIGTERM: unready, but still accepting, until load balancers have noticed"
    )
    drain_queue_s: float = Field(20, ge=0, le=3600, description="after SIGTERM: time for those who wait to get a slot")
    drain_timeout_s: float = Field(30, ge=0, le=3600, description="after SIGTERM: time for open requests to finish")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The file arrives as init values; the environment overrides single values of it.
        return env_settings, init_settings

    @model_validator(mode="after")
    def _is_consistent(self) -> Settings:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("a model is listed twice")
        self._check_names(set(names))
        variants = [variant for model in self.models for variant in model.variants]
        places = [worker.dns or worker.authority for variant in variants for worker in variant.workers]
        if len(set(places)) != len(places):
            raise ValueError("a worker's url is listed twice")
        keeps_batches = self.batches.directory is not None or self.batches.bucket is not None
        if keeps_batches and self.redis is None and self.listen.processes > 1:
            raise ValueError("batches: several processes need redis to share the work")
        if len({tenant.name for tenant in self.tenants}) != len(self.tenants):
            raise ValueError("a tenant is listed twice")
        if self.redis is not None and self.redis.tls is not None and not self.redis.url.startswith("rediss://"):
            raise ValueError("redis.tls needs a url with rediss")
        return self

    def _check_names(self, models: set[str]) -> None:
        """A name means one thing, and a fallback is another model."""
        known = models | {f"{model.name}:{variant.name}" for model in self.models for variant in model.variants}
        for model in self.models:
            for alias in model.aliases:
                if alias.name in known:
                    raise ValueError(f"the alias {alias.name!r} is a name already")
                known.add(alias.name)
            for name in model.fallbacks:
                if name == model.name or name not in models:
                    raise ValueError(f"the fallback {name!r} of model {model.name!r} is not another model")

    @property
    def is_guarded(self) -> bool:
        """Whether keys are asked for: as configured, and otherwise unless all listeners are on loopback."""
        if self.auth.enabled is not None:
            return self.auth.enabled
        hosts = [self.listen.host, *([self.admin.host] if self.admin else [])]
        return not all(is_loopback(host) for host in hosts)


def load_settings(
    path: Path | None = None, *, host: str | None = None, port: int | None = None, processes: int | None = None
) -> Settings:
    """Settings from `path` (YAML), overridden by the environment, overridden by the given arguments.

    Raises ConfigurationError with one line that names the file and the first offending key.
    """
    where = str(path) if path else "environment"
    values = _read_yaml(path) if path else {}
    try:
        settings = Settings(**values)
        flags = {"host": host, "port": port, "processes": processes}
        listen = Listen(**{**settings.listen.model_dump(), **{k: v for k, v in flags.items() if v is not None}})
    except ValidationError as error:
        raise ConfigurationError(f"{where}: {_first_line(error)}") from None
    # What operators ask for is not for everybody who can reach a public address.
    admin = settings.admin or (None if is_loopback(listen.host) else Admin())
    settings = settings.model_copy(update={"listen": listen, "admin": admin})
    _check_listeners(settings, where)
    return settings


def _check_listeners(settings: Settings, where: str) -> None:
    if settings.is_guarded and settings.admission.trust_tenant_header:
        raise ConfigurationError(f"{where}: admission.trust_tenant_header: needs auth: {{enabled: false}}")
    if settings.admin and settings.admin.port == settings.listen.port != 0:
        raise ConfigurationError(f"{where}: admin.port: the same as listen.port")


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > CONFIG_FILE_MAX_BYTES:
            raise ConfigurationError(f"{path}: larger than {CONFIG_FILE_MAX_BYTES} bytes")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: a mapping of settings is expected")
    return {str(key): value for key, value in values.items()}


def _first_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
