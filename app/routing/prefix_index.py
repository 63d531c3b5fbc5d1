"""What each worker probably has in its prefix cache. Pure: no clock, no I/O.

After vLLM's own automatic prefix caching: a prompt is cut into blocks, a block's hash covers the hash of the block
before it, and each worker's blocks go least recently used first. It differs in what is hashed: the bytes of the
request, because the gateway has no tokenizer. So this is a guess at the worker's cache, good enough to choose a worker
by, and never a reason to trust one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Blocks = Sequence[int]
"""The whole blocks at the start of a prompt, as chained 64-bit hashes: equal in two prompts as far as those are."""

REACH_BYTES = 256 * 1024
SAME_SIZE = 64
MAX_BLOCKS = 65_536


@dataclass(slots=True)
class _Cache:
    """One worker's blocks with their sizes in bytes, least recently used first."""

    capacity: int
    held: OrderedDict[int, int] = field(default_factory=OrderedDict)
    used: int = 0


class PrefixIndex:
    """The blocks that each worker has seen, at most `max_blocks` and as many bytes as its cache holds.

    A block is held only while the one before it is: a prompt's last block is touched first and its first block last,
    so the least recently used block is never the parent of another. That makes the longest match a binary search.
    """

    def __init__(self, block_bytes: int, capacity_bytes: int, max_blocks: int = MAX_BLOCKS) -> None:
        """`capacity_bytes` is what a worker holds until `resize` says otherwise."""
        self._ends = block_ends(block_bytes)
        self._sizes = tuple(end - start for start, end in pairwise((0, *self._ends)))
        self._capacity = capacity_bytes
        self._max_blocks = max_blocks
        self._caches: dict[str, _Cache] = {}

    @property
    def reach(self) -> int:
        """How many bytes of a prompt are looked at."""
        return self._ends[-1]

    def blocks(self, prompt: bytes, salt: str) -> Blocks:
        """The whole blocks of `prompt`. Prompts under different salts have none in common.

        `hash` of bytes is SipHash, keyed afresh in every process: four times faster than the fastest of hashlib, and no
        client can aim at a collision. Its values mean nothing outside this process.
        """
        found: list[int] = []
        key, start, length = hash(salt), 0, len(prompt)
        for end in self._ends:
            if end > length:
                break
            key = hash((key, prompt[start:end]))
            found.append(key)
            start = end
        return found

    def size(self, blocks: Blocks) -> int:
        """Bytes in `blocks`."""
        return self._ends[len(blocks) - 1] if blocks else 0

    def cached(self, worker_id: str, blocks: Blocks) -> int:
        """How many bytes at the start of `blocks` the worker has."""
        cache = self._caches.get(worker_id)
        if cache is None or not blocks or blocks[0] not in cache.held:
            return 0
        held = cache.held
        return self.size(blocks[: bisect_left(blocks, True, key=lambda block: block not in held)])

    def displaced(self, worker_id: str, added: int) -> int:
        """How many bytes of other prompts the worker would drop to take `added` new bytes."""
        cache = self._caches.get(worker_id)
        free = cache.capacity - cache.used if cache else self._capacity
        return min(max(added - free, 0), added)

    def remember(self, worker_id: str, blocks: Blocks) -> None:
        """The worker computes, or has just computed, these blocks."""
        if not blocks:
            return
        cache = self._caches.setdefault(worker_id, _Cache(self._capacity))
        held = cache.held
        for depth in range(len(blocks) - 1, -1, -1):
            block = blocks[depth]
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = self._sizes[depth]
                cache.used += self._sizes[depth]
        self._trim(cache)

    def resize(self, worker_id: str, capacity_bytes: int) -> None:
        """The worker's cache holds that much."""
        cache = self._caches.setdefault(worker_id, _Cache(capacity_bytes))
        if cache.capacity != capacity_bytes:
            cache.capacity = capacity_bytes
            self._trim(cache)

    def forget(self, worker_id: str) -> None:
        """The worker is gone, and its cache with it."""
        self._caches.pop(worker_id, None)

    def _trim(self, cache: _Cache) -> None:
        while cache.used > cache.capacity or len(cache.held) > self._max_blocks:
            _, size = cache.held.popitem(last=False)
            cache.used -= size


def block_ends(block_bytes: int, reach: int = REACH_BYTES) -> tuple[int, ...]:
    """Where blocks end: `SAME_SIZE` of them at `block_bytes` each, as many of twice that, and so on up to `reach`.

    Growing blocks keep a long prompt at a few hundred of them and a match exact to a sixty-fourth of its length. At
    least one block, also when it is longer than `reach`.
    """
    ends = [block_bytes]
    size = block_bytes
    while ends[-1] + size <= reach:
        ends.append(ends[-1] + size)
        if len(ends) % SAME_SIZE == 0:
            size *= 2
    return tuple(ends)
