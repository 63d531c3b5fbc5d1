"""The router: filter → score → order, with reasons.

A score is higher for the better worker. To add one: write a function of a worker in `scorers`, give it a weight in
`SCORERS`. The order is total and deterministic: equal scores keep the order of the variants, and within a variant that
of the catalogue, or for prompts worth caching one that depends on the prompt, so that they spread.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from app import settings
from app.inference import InferenceRequest
from app.routing.prefix_index import Blocks, PrefixIndex
from app.routing.scorers import AFFINITY_WEIGHT, ROOM_WEIGHT, SCORERS, busy, load_limit
from app.workers.worker import State, Worker

TAIL_BYTES = 64


class Candidate(msgspec.Struct, frozen=True):
    """A worker that may serve the request, what it scored, and why it may (or can't yet)."""

    worker_id: str
    score: float
    reason: str


class Ranking(msgspec.Struct, frozen=True):
    """Every worker of the pool, best first, and the prompt's blocks, if the policy looked at them.

    Workers that are not ready stay in the ranking, last: they have no slots now, and a request that waits takes the
    first slot that comes up anywhere, theirs too.
    """

    candidates: tuple[Candidate, ...]
    blocks: Blocks = ()

    @property
    def worker_ids(self) -> tuple[str, ...]:
        return tuple([candidate.worker_id for candidate in self.candidates])


class Router:
    """Ranks workers by one policy. Knows what this process has sent to each; keeps no time and does no I/O."""

    def __init__(self, routing: settings.Routing) -> None:
        self._routing = routing
        self._index = PrefixIndex(routing.block_bytes, self._bytes(routing.kv_cache_tokens))
        self._turns: Counter[str] = Counter()
        self._order: Callable[[Sequence[Worker], InferenceRequest], Ranking] = {
            "prefix": self._by_prefix,
            "least_loaded": self._by_load,
            "round_robin": self._in_turn,
        }[routing.policy]

    def rank(self, pool: Sequence[Worker], request: InferenceRequest) -> Ranking:
        """The workers of `pool` for `request`, best first. With one worker there is nothing to decide."""
        if len(pool) <= 1:
            return Ranking(tuple([_alone(worker) for worker in pool]))
        return self._order(pool, request)

    def rank_pools(self, pools: Sequence[Sequence[Worker]], request: InferenceRequest) -> Ranking:
        """The workers of several pools, those of the first before those of the next."""
        ranked = [self.rank(pool, request) for pool in pools]
        if len(ranked) == 1:
            return ranked[0]
        candidates = [candidate for ranking in ranked for candidate in ranking.candidates]
        return Ranking(tuple(candidates), max([ranking.blocks for ranking in ranked], key=len))

    def sent(self, worker: Worker, blocks: Blocks) -> None:
        """A prompt went to `worker`, or its answer has ended there: its cache has these blocks, used just now.

        Said of a worker that is not ready it means nothing: what it had is gone, and must not come back with the last
        of its broken answers.
        """
        if not blocks or not worker.is_ready:
            return
        if worker.load is not None and worker.load.kv_tokens:
            self._index.resize(worker.id, self._bytes(worker.load.kv_tokens))
        self._index.remember(worker.id, blocks)

    def changed(self, worker: Worker) -> None:
        """A worker's state changed. One that is lost, or leaves, comes back with an empty cache, if it does."""
        if worker.condition.state in (State.LOST, State.LEAVING):
            self._index.forget(worker.id)
            self._turns.pop(worker.id, None)

    def _bytes(self, tokens: int) -> int:
        return int(tokens * self._routing.bytes_per_token)

    def _by_load(self, pool: Sequence[Worker], request: InferenceRequest) -> Ranking:
        return _ranking(_candidate(worker) for worker in pool)

    def _in_turn(self, pool: Sequence[Worker], request: InferenceRequest) -> Ranking:
        ready = [worker for worker in pool if worker.is_ready]
        turn = self._turns[pool[0].id] % max(1, len(ready))
        self._turns[pool[0].id] = turn + 1
        order = (*ready[turn:], *ready[:turn])
        first = (Candidate(worker.id, -float(place), "in turn") for place, worker in enumerate(order))
        return Ranking((*first, *(_candidate(worker) for worker in pool if not worker.is_ready)))

    def _by_prefix(self, pool: Sequence[Worker], request: InferenceRequest) -> Ranking:
        prompt = request.prompt_start(self._index.reach)
        blocks = self._index.blocks(prompt, request.cache_salt)
        if not blocks:
            return self._by_load(pool, request)
        ready = [worker for worker in pool if worker.is_ready]
        pool_busy, pool_slots = sum(map(busy, ready)), sum(worker.slots for worker in ready)
        found = []
        for worker in _spread(pool, prompt[-TAIL_BYTES:]):
            if not worker.is_ready:
                found.append(_candidate(worker))
                continue
            limit = load_limit(worker, pool_busy, pool_slots, self._routing.load_bound)
            found.append(self._with_prefix(worker, blocks, is_piled=busy(worker) >= limit))
        return _ranking(found, blocks)

    def _with_prefix(self, worker: Worker, blocks: Blocks, *, is_piled: bool) -> Candidate:
        size, cached = self._index.size(blocks), self._index.cached(worker.id, blocks)
        room = 1.0 - self._index.displaced(worker.id, size - cached) / size
        score = _load_score(worker) + ROOM_WEIGHT * room
        if not cached:
            return Candidate(worker.id, score, "ready")
        if is_piled:
            return Candidate(worker.id, score, "has the prefix and too much of the load")
        return Candidate(worker.id, score + AFFINITY_WEIGHT * cached / size, "has the prefix")


def _ranking(candidates: Iterable[Candidate], blocks: Blocks = ()) -> Ranking:
    return Ranking(tuple(sorted(candidates, key=_best_first)), blocks)


def _candidate(worker: Worker) -> Candidate:
    if not worker.is_ready:
        return Candidate(worker.id, -1.0, worker.condition.reason)
    return Candidate(worker.id, _load_score(worker), "ready")


def _alone(worker: Worker) -> Candidate:
    return Candidate(worker.id, 0.0, "ready" if worker.is_ready else worker.condition.reason)


def _load_score(worker: Worker) -> float:
    return sum(weight * score(worker) for score, weight in SCORERS)


def _best_first(candidate: Candidate) -> float:
    return -candidate.score


def _spread(pool: Sequence[Worker], tail: bytes) -> list[Worker]:
    """The pool with its variants in order, and each variant's workers in an order that depends on the prompt's end.

    Prompts that are new everywhere then fill all caches and not the first one, and every gateway sends the same prompt
    to the same worker, without asking the others.
    """
    key = zlib.crc32(tail)
    variants: dict[str, int] = {}
    return sorted(
        pool,
        key=lambda worker: (
            variants.setdefault(worker.variant.name, len(variants)),
            zlib.crc32(worker.id.encode(), key),
        ),
    )
