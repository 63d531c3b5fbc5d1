"""How many lines may be in flight: what interactive requests leave over, and no more. Pure.

Lines come last in the queue, so a waiting line takes nothing from anybody; and one that runs is taken off its worker
for a request that would wait for its slot, which costs what it has done. So lines are only sent for slots that stand
free, and while interactive requests come a part of what is idle is kept free for the next ones. Between looks the gate
takes back a line for each of them that arrives. One that waits at a look, or a TTFT above its target, halves the lines
that may be in flight; they come back step by step.
"""

from __future__ import annotations

from dataclasses import dataclass

PEAK_KEPT = 0.95
"""Of a peak, after each look: half of it is forgotten after some fourteen."""
RESERVE = 0.05
"""Of what interactive requests leave over; but at least one slot, while there are any."""
WAITING_LINES = 1
"""Lines that may wait for a slot, so that one that comes free is used at once."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the workers of a model. Tokens flow elsewhere; these are slots and requests.

    `slots` there are, of which nobody holds `free`; `interactive` are held, or waited for, by this process' other
    requests; `waiting` requests of all processes outrank lines and wait; `lines_waiting` lines wait; `ttft_s` is the
    recent mean, None without any.
    """

    slots: int
    free: int
    interactive: int
    waiting: int
    lines_waiting: int
    ttft_s: float | None


@dataclass(frozen=True, slots=True)
class Slack:
    """What may be in flight now, and what the next look depends on."""

    limit: int = 0
    peak: float = 0.0

    def look(self, seen: Seen, in_flight: int, *, most: int, ttft_target_s: float) -> Slack:
        """The slack after one more look, while `in_flight` lines run or wait."""
        peak = max(float(seen.interactive), self.peak * PEAK_KEPT)
        if seen.waiting or (seen.ttft_s is not None and seen.ttft_s > ttft_target_s):
            return Slack(min(self.limit, in_flight) // 2, peak)
        reserve = max(1, int((seen.slots - seen.interactive) * RESERVE)) if peak >= 0.5 else 0
        spare = seen.free - reserve
        if seen.lines_waiting > WAITING_LINES or spare < 0:
            fewer = max(seen.lines_waiting - WAITING_LINES, -spare)
            return Slack(max(0, min(self.limit, in_flight) - fewer), peak)
        if spare == 0:
            # A line in the queue fills the next slot that comes free, but only where nobody else would want it.
            queued = WAITING_LINES - seen.lines_waiting if not reserve else 0
            return Slack(min(most, in_flight + queued), peak)
        return Slack(min(most, max(in_flight + (spare + 1) // 2, 1)), peak)
