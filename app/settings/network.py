"""Where the gateway listens, and how it tells that the other side is the right one."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from app.settings.part import Part


class Listen(Part):
    """Where clients connect. `processes` share one socket."""

    host: str = Field(
        "127.0.0.1", description="an address of this machine; anywhere but on loopback keys are asked for"
    )
    port: int = Field(8000, ge=0, le=65535, description="0: any that is free")
    processes: int = Field(1, ge=1, le=64, description="they share one socket")


class Admin(Part):
    """A listener of its own for `/metrics`, `/docs` and `/admin`; the public one then answers 404 for them."""

    host: str = Field("127.0.0.1", description="an address of this machine")
    port: int = Field(8001, ge=0, le=65535, description="0: any that is free")


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


def is_loopback(host: str) -> bool:
    """Whether `host` is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
