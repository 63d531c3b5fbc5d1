"""Which vLLM the gateway's rules were written for. Pure."""

from __future__ import annotations

import re

REVIEWED = (0, 32, 0)
"""Of vLLM: the request fields and paths of this release were reviewed one by one (`tests/hostile/reviewed`)."""

_NUMBERS = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?")


def parse_version(text: object) -> tuple[int, int, int] | None:
    """The release in what a worker calls its version (`0.32.0`, `0.33.1.dev3+g1a2b`); None for none."""
    found = _NUMBERS.match(text) if isinstance(text, str) else None
    return None if found is None else (int(found[1]), int(found[2]), int(found[3] or 0))


def doubt_about(text: object) -> str | None:
    """What an operator should know about a worker of this version, in one line; None for nothing.

    An older one lacks fixes that the rules rely on: chat templates and media of requests had holes before 0.32.
    """
    version = parse_version(text)
    if version is None or version >= REVIEWED:
        return None
    found, wanted = (".".join(map(str, numbers)) for numbers in (version, REVIEWED))
    return f"vLLM {found} is older than {wanted} and lacks its security fixes"
