"""The server that all gateway processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from app.settings.network import Tls
from app.settings.part import Part


class Redis(Part):
    """The server that all gateway processes share. Left out, each process admits on its own."""

    url: str = Field("redis://127.0.0.1:6379/0", description="`rediss://` for TLS; `USER@` before the host")
    password_file: Path | None = Field(None, description="holds the password, which is better not in the url")
    tls: Tls | None = Field(None, description="default for rediss: the system's authorities")
    prefix: str = Field("sluice", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="of all keys; one per fleet")
    call_timeout_s: float = Field(1.0, ge=0.05, le=60, description="after which a server that is silent counts as lost")
    allow_eviction: bool = Field(False, description="start although the server may evict keys, leases among them")

    @model_validator(mode="after")
    def _has_one_password(self) -> Self:
        if self.password_file is not None and urlsplit(self.url).password is not None:
            raise ValueError("a password in url and password_file are both given")
        return self
