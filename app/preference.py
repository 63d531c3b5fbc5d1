"""What one request asks of the choice among a model's variants. Pure.

In the body an object `sluice`, which no worker gets to see; in headers `x-sluice-policy` and `x-sluice-session`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec

from app.errors import InvalidValue

FIELD = "sluice"
SESSION_MAX_CHARS = 256


class Policy(StrEnum):
    """See `settings.Choosing`."""

    QUALITY = "quality"
    ECONOMY = "economy"
    BALANCED = "balanced"
    ANY = "any"
    PINNED = "pinned"
    CASCADE = "cascade"


class Preference(msgspec.Struct, frozen=True):
    """What is None or empty is left to the tenant's terms and the model's.

    `cost_weight` is the λ of `balanced`; `ttft_s` the time within which the first token is wanted. `degrade` can only
    take the tenant's consent back. Requests of one `session` are on the same side of a canary.
    """

    policy: Policy | None = None
    cost_weight: float | None = None
    quality_floor: float | None = None
    ttft_s: float | None = None
    degrade: bool | None = None
    session: str = ""


NO_PREFERENCE = Preference()


def preference_of(value: Any) -> Preference:
    """The preference in the body's object. Raises InvalidValue for what it does not know or what is out of range."""
    if type(value) is not dict:
        raise InvalidValue(f"Invalid value for {FIELD!r}: expected an object.", param=FIELD)
    read: dict[str, Any] = {}
    for name, given in value.items():
        if name not in _READERS:
            raise InvalidValue(f"{FIELD!r} knows {', '.join(_READERS)} only.", param=f"{FIELD}.{name[:64]}")
        field, reader = _READERS[name]
        read[field] = reader(given, f"{FIELD}.{name}")
    return Preference(**read)


def policy_of(value: Any, where: str) -> Policy:
    """Raises InvalidValue."""
    try:
        return Policy(value)
    except ValueError:
        raise InvalidValue(f"Invalid value for {where!r}: expected one of {', '.join(Policy)}.", param=where) from None


def session_of(value: Any, where: str) -> str:
    """Raises InvalidValue."""
    if type(value) is not str or not 0 < len(value) <= SESSION_MAX_CHARS:
        raise InvalidValue(f"Invalid value for {where!r}: expected up to {SESSION_MAX_CHARS} characters.", param=where)
    return value


def _flag(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise InvalidValue(f"Invalid value for {where!r}: expected true or false.", param=where)
    return value


def _number(least: float, most: float) -> Callable[[Any, str], float]:
    def read(value: Any, where: str) -> float:
        if (type(value) is not float and type(value) is not int) or not least <= value <= most:
            raise InvalidValue(f"Invalid value for {where!r}: expected {least:g} to {most:g}.", param=where)
        return float(value)

    return read


def _milliseconds(value: Any, where: str) -> float:
    return _number(1, 3_600_000)(value, where) / 1000


_READERS: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
    "policy": ("policy", policy_of),
    "lambda": ("cost_weight", _number(0, 100)),
    "quality_floor": ("quality_floor", _number(0, 1)),
    "ttft_ms": ("ttft_s", _milliseconds),
    "degrade": ("degrade", _flag),
    "session": ("session", session_of),
}
