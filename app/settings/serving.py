"""How requests wait, are routed and relayed, and how workers are watched."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from app.settings.part import BandName, Part


class Admission(Part):
    """Who waits, how long, and in which order. Limits hold across all replicas that share a Redis.

    By default there is room for every band to be full, so none crowds out another, and four tenants fill a band.
    """

    queue_limit: int = Field(16_000, ge=0, description="requests that may wait, in all")
    queue_limit_per_band: int = Field(4000, ge=0, description="of one band")
    queue_limit_per_tenant: int = Field(1000, ge=0, description="of one tenant")
    queue_mib: int = Field(1024, ge=1, description="bodies of requests that wait, in all")
    queue_mib_per_band: int = Field(256, ge=1, description="of one band")
    queue_mib_per_tenant: int = Field(64, ge=1, description="of one tenant")
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

    policy: Literal["prefix", "least_loaded", "round_robin"] = Field("prefix", description="see above")
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

    connect_timeout_s: float = Field(2, gt=0, le=60, description="until a worker takes the connection")
    first_byte_timeout_s: float = Field(120, gt=0, le=3600, description="from dispatch to the worker's first body byte")
    gap_timeout_s: float = Field(60, gt=0, le=3600, description="longest silence inside a stream")
    total_timeout_s: float = Field(3600, gt=0, le=86400, description="longest answer")
    client_stall_timeout_s: float = Field(30, gt=0, le=3600, description="longest time a client may not read")
    idle_connections_per_worker: int = Field(256, ge=0, le=65536, description="kept open for the next request")
    keepalive_s: float = Field(4, gt=0, le=300, description="below the worker's own keep-alive, vLLM's default is 5 s")
    stalled_gap_timeout_s: float = Field(
        10, gt=0, le=3600, description="longest silence inside a stream of a worker that stalls"
    )
    retry_share: float = Field(0.2, ge=0, le=1, description="second attempts, as a share of a pool's requests")
    retries_per_s: float = Field(10, ge=0, le=1000, description="second attempts of a pool that are free of that share")
    failures_until_ejected: int = Field(3, ge=1, le=100, description="failed attempts in a row")
    ejection_s: float = Field(10, gt=0, le=3600, description="the first; each one that follows soon is twice as long")
    ejection_max_s: float = Field(300, gt=0, le=86400, description="the longest")
    rest_max_s: float = Field(10, gt=0, le=300, description="longest rest of a worker that says it is full")
    quarantine_s: float = Field(600, gt=0, le=86400, description="how long a request that kills workers is refused")
    resumes_per_stream: int = Field(1, ge=0, le=4, description="times that one stream of a resumable model may go on")
    resume_max_tokens: int = Field(
        32_768, ge=1, le=1_048_576, description="prompt and answer; longer streams are not resumed (4 bytes a token)"
    )


class Health(Part):
    """How workers are watched."""

    probe_interval_s: float = Field(2, gt=0, le=60, description="between two looks at a worker's health and metrics")
    probe_timeout_s: float = Field(1, gt=0, le=60, description="longest wait for one of them")
    probe_misses: int = Field(3, ge=1, le=100, description="failed probes in a row before a worker is left")
    canary_timeout_s: float = Field(60, gt=0, le=600, description="longest wait for the one token that proves a worker")
    progress_timeout_s: float = Field(
        30, gt=0, le=3600, description="a worker at work that is silent for so long is asked for a token"
    )
    progress_canary_timeout_s: float = Field(10, gt=0, le=600, description="longest wait for that token")
    slow_start_s: float = Field(10, ge=0, le=600, description="a worker that returns has all its slots after this time")
    kv_usage_max: float = Field(0.95, gt=0, le=1, description="share of the KV cache above which no new work is sent")
