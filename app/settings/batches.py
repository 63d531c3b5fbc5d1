"""Files and the Batch API."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from app.settings.part import Part


class Bucket(Part):
    """Object storage that speaks S3. Credentials come from the environment or the machine's role, as AWS's tools do."""

    name: str = Field(description="of the bucket")
    prefix: str = Field("", description="of all keys")
    endpoint: str | None = Field(None, description="of another provider than AWS; http:// only on a trusted network")
    region: str | None = Field(None, description="default: as AWS's tools find it")


class Batches(Part):
    """Files and the Batch API. Several gateways share them through Redis and the same directory or bucket."""

    directory: Path | None = Field(None, description="where they are kept; without it and a bucket there are none")
    bucket: Bucket | None = Field(None, description="keep them there instead")
    lines: int = Field(50_000, ge=1, le=1_000_000, description="requests of one batch")
    file_bytes: int = Field(200 * 1024 * 1024, ge=1, description="of one upload")
    line_bytes: int = Field(1024 * 1024, ge=1, description="of one request")
    range_lines: int = Field(128, ge=1, le=1000, description="lines that one gateway claims together")
    range_bytes: int = Field(4 * 1024 * 1024, ge=1, description="no more of the input are claimed together")
    files_kept_s: int = Field(30 * 86400, ge=60, description="for files without a date of their own")
    batches_kept_s: int = Field(30 * 86400, ge=60, description="what is told of a batch, after it ended")
    keys_kept_s: int = Field(86400, ge=60, description="so long an Idempotency-Key stands for the same batch")
    batches_per_tenant: int = Field(100, ge=1, description="that are not finished")
    lines_in_flight: int = Field(256, ge=1, le=65536, description="of one model, by one gateway process")
    ttft_target_s: float = Field(1.0, gt=0, description="TTFT of interactive streams above which lines give way")
    attempts_per_line: int = Field(3, ge=1, le=100, description="dispatches that broke before a line counts as failed")
    preemptions_per_line: int = Field(
        3, ge=0, le=100, description="times that a line gives its slot to an interactive request; then it keeps it"
    )
    lease_s: float = Field(15, ge=1, le=300, description="a silent gateway's claims end after this")
    tick_s: float = Field(0.5, gt=0, le=60, description="between two looks at what is to do")
    commit_interval_s: float = Field(0.25, ge=0, le=60, description="longest time that a finished line is not stored")
