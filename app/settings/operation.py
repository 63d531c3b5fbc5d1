"""What operators see of a running gateway, and change on it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from app.settings.part import Part


class Reload(Part):
    """How changes are found while the gateway runs: of models, workers and tenants. SIGHUP looks at once."""

    watch_interval_s: float = Field(
        1, ge=0, le=3600, description="between two looks at the files; 0: at a signal only. Two looks must agree"
    )
    dns_interval_s: float = Field(5, gt=0, le=3600, description="between two questions about each worker's dns name")
    dns_timeout_s: float = Field(3, gt=0, le=60, description="longest wait for an answer")
    workers_per_name: int = Field(256, ge=1, le=4096, description="addresses of one dns name, or of one workers_file")


class Logs(Part):
    """Lines on standard output; nothing of a prompt or an answer is in them."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least that is written")
    format: Literal["json", "text"] = Field("json", description="`text` is for reading along")
    requests: Literal["all", "failed", "none"] = Field("failed", description="which requests have a line")


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
    export_interval_s: float = Field(2, gt=0, le=60, description="between two exports")
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
