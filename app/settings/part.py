"""What every part of the settings is: immutable, strict about keys; and the names that several parts use."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

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
