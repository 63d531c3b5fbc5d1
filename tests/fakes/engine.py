"""The fake engine: slots, an inner waiting queue, a prefix cache, and time spent as vLLM spends it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that work takes; all zero means as fast as possible.

    A step of the batch takes `decode_s + decode_s_per_running * running`, and at least `decode_floor_s`: every running
    sequence gets one token a step. With a floor the throughput has a knee, as where reading the weights takes longest.
    """

    prefill_s: float = 0.0
    prefill_s_per_token: float = 0.0
    decode_s: float = 0.0
    decode_s_per_running: float = 0.0
    decode_floor_s: float = 0.0

    def prefill(self, tokens: int) -> float:
        return self.prefill_s + self.prefill_s_per_token * tokens

    def step(self, running: int) -> float:
        return max(self.decode_floor_s, self.decode_s + self.decode_s_per_running * running)

    def slowed(self, factor: float) -> Timing:
        """This timing stretched by a factor; time that was free counts as 1 ms."""
        return replace(
            self,
            prefill_s=max(self.prefill_s, 0.001) * factor,
            prefill_s_per_token=self.prefill_s_per_token * factor,
            decode_s=max(self.decode_s, 0.001) * factor,
            decode_s_per_running=self.decode_s_per_running * factor,
            decode_floor_s=self.decode_floor_s * factor,
        )


class PrefixCache:
    """Whole blocks of prompt tokens seen before, least recently used out first, keyed by all tokens up to their end."""

    def __init__(self, block_size: int, blocks: int) -> None:
        self.block_size = block_size
        self._capacity = blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.queries = 0
        self.hits = 0

    def admit(self, tokens: Sequence[int], salt: str | None = None) -> int:
        """Count a prompt and remember its blocks. Returns the tokens found; the last token is always computed.

        Prompts under different salts have no block in common.
        """
        found, still_found, key = 0, True, hash(salt)
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            key = hash((key, *tokens[end - self.block_size : end]))
            still_found = still_found and key in self._blocks and end < len(tokens)
            found = end if still_found else found
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        self.queries += len(tokens)
        self.hits += found
        return found


class Engine:
    """Runs at most `max_num_seqs` sequences; others wait in order of arrival. `changed` is called on every change."""

    def __init__(self, max_num_seqs: int, cache: PrefixCache, changed: Callable[[], None]) -> None:
        self.max_num_seqs = max_num_seqs
        self.cache = cache
        self.running = 0
        self.starved = 0
        self.preemptions = 0
        self.kv_tokens = 0
        self._changed = changed
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._go = asyncio.Event()
        self._go.set()

    @property
    def waiting(self) -> int:
        return sum(sequences for sequences, _ in self._queue) + self.starved

    def hold(self) -> None:
        """Stop the engine before its next step: requests are accepted and admitted, no token comes."""
        self._go.clear()

    def resume(self) -> None:
        self._go.set()

    @asynccontextmanager
    async def admitted(self, sequences: int) -> AsyncIterator[None]:
        """Hold slots for that many sequences (never more than there are), waiting for them in order of arrival."""
        sequences = min(sequences, self.max_num_seqs)
        await self._acquire(sequences)
        try:
            yield
        finally:
            self._release(sequences)

    async def _acquire(self, sequences: int) -> None:
        if not self._queue and self.running + sequences <= self.max_num_seqs:
            self.running += sequences
            self._changed()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((sequences, turn))
        self._changed()
        try:
            await turn
        except asyncio.CancelledError:
            # The grant may have come in the same tick as the cancellation: then the slots are ours to give back.
            if turn.done() and not turn.cancelled():
                self._release(sequences)
            else:
                # `_grant` may already have skipped this place: it had been cancelled when its turn came.
                self._queue = deque(place for place in self._queue if place[1] is not turn)
                self._grant()
            raise

    def _release(self, sequences: int) -> None:
        self.running -= sequences
        self._grant()

    def _grant(self) -> None:
        while self._queue and self.running + self._queue[0][0] <= self.max_num_seqs:
            sequences, turn = self._queue.popleft()
            if not turn.done():
                self.running += sequences
                turn.set_result(None)
        self._changed()

    @contextmanager
    def starving(self) -> Iterator[None]:
        """Count as waiting for KV blocks that do not come."""
        self.starved += 1
        self.preemptions += 1
        self._changed()
        try:
            yield
        finally:
            self.starved -= 1
            self._changed()

    @contextmanager
    def holding(self, tokens: int) -> Iterator[None]:
        """Count that many tokens' KV blocks as in use."""
        self.kv_tokens += tokens
        try:
            yield
        finally:
            self.kv_tokens -= tokens

    async def prefill(self, tokens: int, timing: Timing) -> None:
        """Spend the time of computing that many prompt tokens."""
        await self._go.wait()
        await asyncio.sleep(timing.prefill(tokens))

    async def step(self, timing: Timing) -> None:
        """Spend the time of one decoding step of the batch; always gives other tasks a turn."""
        await self._go.wait()
        await asyncio.sleep(timing.step(self.running))
