"""How many slots a worker gets that is told `auto`: the smallest number that keeps its throughput. Pure.

A gradient of latency (Netflix's concurrency-limits, Envoy's adaptive concurrency) calls it overload when an answer
takes longer than the quickest did; but a batch makes every token slower from the first request on, and is worth it.
What tells is the throughput that a limit brings, by the worker's own count of generated tokens, and the engine's word
that it does not take more (requests that wait inside it, preemptions, a full KV cache).

So the limit climbs while more of it brings more, goes back to the smallest one that brings as much as the best, and
stays there. Now and then it looks one step up and one down, because the knee moves with the requests.

Only whole windows count in which the limit was used up, or a lower one that is enough would have been: without demand
nothing is learned and nothing changes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from app.workers.vllm_metrics import EngineLoad

FIRST = 8
KEPT = 0.97
"""The share of the best throughput that a limit has to bring to be as good as the best."""
USED = 0.85
"""The share of a limit that has to be at work, on average, for a window to tell of that limit."""
WINDOW = 4
"""Readings in a window, after one that lets a new limit come into effect."""
HOLD = 24
"""Windows that a limit is kept before others are tried again: about three minutes."""
MEMORY = 0.5
"""Weight of the newest window in what is known of a limit."""
KV_MOST = 0.9
"""Share of the KV cache that requests of the present size may fill; above it the engine is about to preempt."""
KV_MEMORY = 0.8
TAKES_FOR = 150
"""Readings after which an engine is no longer held to what it took at once: about five minutes."""


@dataclass(slots=True)
class _Window:
    """Readings under one limit since `first`."""

    first: EngineLoad
    running: list[int] = field(default_factory=list)

    def tokens_per_s(self, last: EngineLoad) -> float:
        return (last.generated - self.first.generated) / (last.at - self.first.at)


class AdaptiveSlots:
    """The limit of one worker, 1 to `most`. One reading of its metrics moves it by half or to the double at most.

    Several gateways read the same counters, and each has such a limit; the ledger lets one of them steer. The others
    are told its `steered` limit, learn what it brings, and go on from there when it is their turn.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = min(FIRST, most)
        self._brings: dict[int, float] = {}
        self._windows: Counter[int] = Counter()
        self._trusted = 0
        self._before: EngineLoad | None = None
        self._window: _Window | None = None
        self._takes: int | None = None
        self._takes_for = 0
        self._held = 0
        self._has_settled = False
        self._kv_used = 0.0
        self._kv_users = 0.0

    def observe(self, load: EngineLoad, steered: int | None = None) -> int:
        """The limit after one more reading."""
        before, self._before = self._before, load
        if before is None or load.generated < before.generated:
            self._forget()
        elif load.at > before.at:
            self._note_kv(load)
            self._takes_for -= 1
            if self._takes_for <= 0:
                self._takes = None
            if steered is None and self._is_crowded(before, load):
                self._shrink(load)
            else:
                self._extend_window(load, may_move=steered is None)
        self._go_to(self.limit if steered is None else steered)
        return self.limit

    @property
    def room(self) -> int:
        """What the engine has room for, as far as it is known."""
        if self._kv_users < 1:
            by_kv = self.most
        else:
            by_kv = int(KV_MOST * self._kv_users / self._kv_used) if self._kv_used > 0 else self.most
        return max(1, min(self.most, by_kv, self._takes or self.most))

    def _forget(self) -> None:
        """A worker that is new, or was restarted."""
        self._brings, self._window, self._takes = {}, None, None
        self._windows.clear()
        self._trusted = 0
        self._held, self._has_settled = 0, False
        self._kv_used = self._kv_users = 0.0
        self.limit = min(FIRST, self.most)

    def _note_kv(self, load: EngineLoad) -> None:
        self._kv_used = KV_MEMORY * self._kv_used + load.kv_usage * (load.running > 0)
        self._kv_users = KV_MEMORY * self._kv_users + load.running

    def _is_crowded(self, before: EngineLoad, load: EngineLoad) -> bool:
        """Whether it does not run what this limit lets in. One reading may have caught requests on their way in, and
        above the limit are those that an earlier one let in, or that came another way."""
        if load.preemptions > before.preemptions:
            return load.running <= self.limit
        is_waited_for = before.waiting > 0 and load.waiting > 0
        return is_waited_for and load.running + load.waiting <= self.limit + self.limit // 8

    def _shrink(self, load: EngineLoad) -> None:
        self._takes = max(1, self.limit // 2, min(self.limit - 1, load.running))
        self._takes_for = TAKES_FOR
        self._brings = {limit: tokens for limit, tokens in self._brings.items() if limit <= self._takes}

    def _extend_window(self, load: EngineLoad, *, may_move: bool) -> None:
        window = self._window
        if window is None:
            # A limit that was lowered is in effect when those above it have left.
            self._window = _Window(load) if load.running <= self.limit else None
            return
        window.running.append(load.running)
        if len(window.running) < WINDOW:
            return
        self._window = _Window(load)
        if sum(window.running) >= USED * self._least() * WINDOW:
            self._learn(window.tokens_per_s(load))
            if may_move:
                self._go_to(self._best())

    def _least(self) -> int:
        """The running requests with which a window tells of the limit: all of it, or as many as a lower limit that is
        known to be enough. Or it would stay, for ever, at one that demand does not reach."""
        return min(self.limit, self._smallest_enough()) if self._brings else self.limit

    def _learn(self, tokens_per_s: float) -> None:
        known = self._brings.get(self.limit, tokens_per_s)
        self._brings[self.limit] = known + MEMORY * (tokens_per_s - known)
        self._windows[self.limit] += 1

    def _best(self) -> int:
        """The limit to be at, or to try, next."""
        doubtful = self._doubtful()
        if doubtful:
            return self._trusted if self.limit == doubtful else doubtful
        enough, most = self._smallest_enough(), self.room
        self._trusted = enough
        if self._held:
            self._held -= 1
            if not self._held:
                self._brings = {enough: self._brings[enough]}
                self._windows.clear()
            return enough
        highest = max(self._brings)
        if enough == highest < most:
            return min(most, -(-highest * 5 // 4) if self._has_settled else highest * 2)
        lower = max((limit for limit in self._brings if limit < enough), default=None)
        if lower is None and enough > 1:
            return min(enough - 1, enough * 4 // 5)
        if lower is not None and enough - lower > max(1, enough // 8):
            return (lower + enough) // 2
        self._held, self._has_settled = HOLD, True
        return enough

    def _doubtful(self) -> int:
        """A lower limit that seemed to be enough in one window, 0 for none. A machine that others use too has good and
        bad times: before it is believed, the limit of before is looked at once more, and then the lower one again."""
        floor = KEPT * max(self._brings.values())
        seen_once = (limit for limit, brings in self._brings.items() if brings >= floor and self._windows[limit] == 1)
        return max((limit for limit in seen_once if limit < self._trusted), default=0)

    def _smallest_enough(self) -> int:
        best = max(self._brings.values())
        return min(limit for limit, tokens in self._brings.items() if tokens >= KEPT * best)

    def _go_to(self, limit: int) -> None:
        limit = min(limit, self.room)
        if limit != self.limit:
            self.limit, self._window = limit, None
