"""The server that all gateway processes share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from app.settings.network import Tls
from app.settings.part import Part

SCHEMES = ("redis", "rediss", "unix")
NODES_MAX = 16

_NODE = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]{1,253}):([0-9]{1,5})$")


def _node(given: str) -> str:
    found = _NODE.match(given)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError("expected HOST:PORT, an IPv6 address in brackets")
    return given


Node = Annotated[str, AfterValidator(_node)]


class Sentinel(Part):
    """Sentinels that know which server is the primary, by its name."""

    master: str = Field(min_length=1, max_length=255, description="the name that they know the primary by")
    nodes: tuple[Node, ...] = Field(min_length=1, max_length=NODES_MAX, description="`HOST:PORT` of each of them")
    username: str | None = Field(None, description="their user, where they ask for one")
    password_file: Path | None = Field(None, description="holds the password that they ask for")


class Redis(Part):
    """The server that all gateway processes share. Left out, each process admits on its own."""

    url: str = Field("redis://127.0.0.1:6379/0", description="`rediss://` for TLS; `USER@` before the host")
    sentinel: Sentinel | None = Field(None, description="instead of a url: who is asked for the primary")
    cluster: tuple[Node, ...] = Field(
        (), max_length=NODES_MAX, description="instead of a url: `HOST:PORT` of nodes that know the cluster"
    )
    username: str | None = Field(
        None, min_length=1, description="of a server found by sentinel or cluster; otherwise in the url"
    )
    password_file: Path | None = Field(None, description="holds the password, which is better not in the url")
    tls: Tls | None = Field(
        None, description="default for rediss: the system's authorities; `{}` turns it on with sentinel or cluster"
    )
    prefix: str = Field("sluice", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="of all keys; one per fleet")
    call_timeout_s: float = Field(1.0, ge=0.05, le=60, description="after which a server that is silent counts as lost")
    allow_eviction: bool = Field(False, description="start although the server may evict keys, leases among them")

    @field_validator("url")
    @classmethod
    def _can_be_reached(cls, url: str) -> str:
        """Errors never quote it: it may hold a password."""
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ValueError("expected redis://, rediss:// or unix://")
        if set(parse_qs(parts.query, keep_blank_values=True)) - {"db"}:
            raise ValueError("its query may name db, and nothing else")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError("expected a port up to 65535") from None
        database = parts.path.lstrip("/") if parts.scheme != "unix" else ""
        if database and not (database.isascii() and database.isdigit()):
            raise ValueError("behind the host comes the number of a database")
        return url

    @model_validator(mode="after")
    def _is_one_way(self) -> Self:
        ways = [self.sentinel is not None, bool(self.cluster), "url" in self.model_fields_set]
        if sum(ways) > 1:
            raise ValueError("url, sentinel and cluster: only one of them can be given")
        if not self.is_found and self.username is not None:
            raise ValueError("username: of a server with a url it belongs there, before the host")
        if self.password_file is not None and urlsplit(self.url).password is not None:
            raise ValueError("a password in url and password_file are both given")
        if self.tls is not None and not self.is_tls:
            raise ValueError("tls needs a url with rediss")
        return self

    @property
    def is_found(self) -> bool:
        """Whether the server has to be asked for, as it may be another tomorrow."""
        return self.sentinel is not None or bool(self.cluster)

    @property
    def is_tls(self) -> bool:
        return self.tls is not None if self.is_found else urlsplit(self.url).scheme == "rediss"
