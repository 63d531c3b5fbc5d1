"""What is left of a tenant's limits, as OpenAI tells it: `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`.

https://platform.openai.com/docs/guides/rate-limits: `reset` is how long until the limit is whole again.
"""

from __future__ import annotations

from app.admission.quota import REQUESTS
from app.admission.reservation import duration
from app.errors import Allowance


def rate_limit_headers(allowances: tuple[Allowance, ...]) -> list[tuple[bytes, bytes]]:
    """None for who has no limits. With several limits on tokens, those of the one that has the least left."""
    if not allowances:
        return []
    requests = [allowance for allowance in allowances if allowance.limit == REQUESTS]
    tokens = [allowance for allowance in allowances if allowance.limit != REQUESTS]
    headers = _headers(b"requests", requests[0]) if requests else []
    if tokens:
        headers += _headers(b"tokens", min(tokens, key=lambda allowance: allowance.remaining))
    return headers


def _headers(what: bytes, allowance: Allowance) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit-" + what, b"%d" % allowance.most),
        (b"x-ratelimit-remaining-" + what, b"%d" % allowance.remaining),
        (b"x-ratelimit-reset-" + what, duration(allowance.reset_s).encode()),
    ]
