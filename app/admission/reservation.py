"""What one request has reserved of its tenant's limits, from arrival to end, and what its client is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from app.admission.quota import DAILY, NOTHING, Claim, Demand, Reading, Settlement, Tokens, amounts_of, claims_of
from app.errors import Allowance, GatewayError, InsufficientQuota, RateLimitExceeded
from app.inference import Spent, TokenUsage
from app.tenant import Limits

US = 1_000_000
AT_ONCE_RETRY_S = 1.0  # when one of those at once ends nobody knows


class Home(Protocol):
    """Where reservations are kept. Never waits, never fails."""

    def settle(self, settlement: Settlement) -> None:
        """End a reservation; nothing happens if it is not known here."""


class Reservation:
    """Made once for a request, whatever becomes of its places in the queue; settled once.

    `home` is where it is known to be taken, None as long as nobody has said so; `made` is when, monotonic seconds.
    """

    __slots__ = ("demand", "guessed", "home", "made", "readings", "tenant")

    def __init__(self, name: str, tenant: str, limits: Limits, guessed: Tokens, max_tokens: int | None) -> None:
        stated = 0 if max_tokens is None else max_tokens
        unstated = guessed.output if max_tokens is None else 0
        claims = claims_of(limits, Tokens(0, stated), Tokens(guessed.input, unstated))
        self.demand = Demand(name, limits.concurrent or 0, claims)
        self.guessed = Tokens(guessed.input, stated or unstated)
        self.tenant = tenant
        self.home: Home | None = None
        self.made = 0.0
        self.readings: Sequence[Reading] = ()
        """How its limits stood when it was met or refused, in the order of its claims."""

    @property
    def too_large(self) -> Claim | None:
        """A claim that its limit can never meet."""
        for claim in self.demand.claims:
            if claim.is_too_large:
                return claim
        return None

    @property
    def allowances(self) -> tuple[Allowance, ...]:
        return tuple(
            Allowance(claim.limit, claim.most, max(0, claim.most - reading.used), reading.reset_us / US)
            for claim, reading in zip(self.demand.claims, self.readings, strict=False)
        )

    def settlement(self, spent: TokenUsage | Spent | None) -> Settlement:
        """Its end; None was no request at all."""
        claims = self.demand.claims
        if spent is None:
            return self._settled((0,) * len(claims))
        if isinstance(spent, TokenUsage):
            return self._settled(amounts_of(claims, Tokens(spent.prompt_tokens, spent.completion_tokens), NOTHING))
        known = Tokens(spent.prompt_tokens or 0, spent.completion_tokens or 0)
        guessed = Tokens(
            self.guessed.input if spent.prompt_tokens is None else 0,
            self.guessed.output if spent.completion_tokens is None else 0,
        )
        return self._settled(amounts_of(claims, known, guessed))

    def _settled(self, amounts: tuple[int, ...]) -> Settlement:
        return Settlement(self.demand.reservation, self.tenant, self.demand.claims, amounts)

    def refusal(self, wait_us: int) -> tuple[str, GatewayError]:
        """The limit that has no room for it, and what its client is told; with more than one, the longest window's."""
        exceeded = [
            (claim, reading.used)
            for claim, reading in zip(self.demand.claims, self.readings, strict=False)
            if reading.used + claim.amount > claim.most
        ]
        claim, used = exceeded[-1]
        kind = InsufficientQuota if claim.limit == DAILY else RateLimitExceeded
        return claim.limit, kind(
            f"Rate limit reached on {_words(claim.limit)}: Limit {claim.most}, Used {used}, Requested {claim.amount}."
            f" Please try again in {duration(wait_us / US)}.",
            retry_after_s=wait_us / US,
        )

    def refusal_at_once(self) -> GatewayError:
        return RateLimitExceeded(
            f"Rate limit reached on concurrent requests: Limit {self.demand.concurrent}. Please try again when one of"
            " yours has ended.",
            retry_after_s=AT_ONCE_RETRY_S,
        )


def too_large(claim: Claim) -> GatewayError:
    error = RateLimitExceeded(
        f"Request too large on {_words(claim.limit)}: Limit {claim.most}, Requested {claim.amount}. The input or output"
        " tokens must be reduced in order to run successfully."
    )
    error.should_retry = False
    return error


def duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `8.64s`, `6m0s`, `23h59m8s`."""
    ms = round(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, left_ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{left_ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return (f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else "") + text


def _words(limit: str) -> str:
    return limit.replace("_", " ")
