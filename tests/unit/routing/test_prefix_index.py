"""The prefix index against what a cache of whole blocks must do, whatever comes in whatever order."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from app.routing.prefix_index import MAX_BLOCKS, REACH_BYTES, SAME_SIZE, Blocks, PrefixIndex, block_ends

BLOCK = 16

prompts = st.builds(
    lambda blocks, rest: b"".join(blocks) + rest,
    st.lists(st.sampled_from([b"a" * BLOCK, b"b" * BLOCK]), max_size=12),
    st.sampled_from([b"", b"a", b"b" * (BLOCK - 1)]),
)


def index(capacity: int = 10_000, max_blocks: int = MAX_BLOCKS) -> PrefixIndex:
    return PrefixIndex(BLOCK, capacity, max_blocks)


def shared(one: bytes, other: bytes) -> int:
    """Bytes of whole blocks that both begin with, found byte by byte."""
    same = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same // BLOCK * BLOCK


@given(prompts, prompts)
def test_a_worker_has_of_a_prompt_what_it_shares_with_the_one_it_saw(seen: bytes, asked: bytes) -> None:
    caches = index()
    caches.remember("w", caches.blocks(seen, ""))
    assert caches.cached("w", caches.blocks(asked, "")) == shared(seen, asked)
    assert caches.cached("other", caches.blocks(asked, "")) == 0


@given(st.lists(prompts, max_size=6), prompts)
def test_of_several_prompts_the_longest_match_counts(seen: list[bytes], asked: bytes) -> None:
    caches = index()
    for prompt in seen:
        caches.remember("w", caches.blocks(prompt, ""))
    assert caches.cached("w", caches.blocks(asked, "")) == max((shared(prompt, asked) for prompt in seen), default=0)


@given(prompts, st.data())
def test_the_longer_the_shared_prefix_the_more_is_cached(prompt: bytes, data: st.DataObject) -> None:
    shorter, longer = sorted(data.draw(st.integers(0, len(prompt))) for _ in range(2))
    caches = index()
    caches.remember("short", caches.blocks(prompt[:shorter], ""))
    caches.remember("long", caches.blocks(prompt[:longer], ""))
    asked = caches.blocks(prompt, "")
    assert caches.cached("short", asked) <= caches.cached("long", asked) <= caches.size(asked)


@given(prompts, st.text(min_size=1, max_size=32))
def test_equal_prompts_of_different_tenants_never_match(prompt: bytes, salt: str) -> None:
    caches = index()
    caches.remember("w", caches.blocks(prompt, ""))
    assert caches.cached("w", caches.blocks(prompt, salt)) == 0
    assert not set(caches.blocks(prompt, "")) & set(caches.blocks(prompt, salt))


@given(st.lists(prompts, max_size=10), st.integers(0, 300), st.integers(1, 8), st.integers(0, 300))
def test_never_more_than_fits_and_all_that_is_held_can_match(
    seen: list[bytes], capacity: int, most: int, resized: int
) -> None:
    caches = index(capacity, most)
    everything = [caches.blocks(prompt, "") for prompt in seen]
    for blocks in everything:
        caches.remember("w", blocks)
        assert held_bytes(caches, everything) <= min(capacity, most * BLOCK)
    caches.resize("w", resized)
    held = held_bytes(caches, everything)
    assert held <= resized
    assert caches.displaced("w", 1_000) == 1_000 - (resized - held)


def held_bytes(caches: PrefixIndex, everything: list[Blocks]) -> int:
    """Bytes held, counted from outside: every block that is part of some prompt's match."""
    found = {block for blocks in everything for block in blocks[: caches.cached("w", blocks) // BLOCK]}
    return len(found) * BLOCK


def test_the_least_recently_used_prompt_goes_first_and_its_end_before_its_start() -> None:
    caches = index(capacity=4 * BLOCK)
    old, new = (caches.blocks(letter * 2 * BLOCK, "") for letter in (b"a", b"b"))
    caches.remember("w", old)
    caches.remember("w", new)
    caches.remember("w", old)
    caches.remember("w", caches.blocks(b"c" * BLOCK, ""))
    assert caches.cached("w", old) == 2 * BLOCK
    assert caches.cached("w", new) == BLOCK


def test_a_lost_worker_has_nothing_and_the_others_keep_theirs() -> None:
    caches = index()
    blocks = caches.blocks(b"a" * 100, "")
    for worker in ("lost", "kept"):
        caches.remember(worker, blocks)
    caches.forget("lost")
    assert caches.cached("lost", blocks) == 0
    assert caches.cached("kept", blocks) == caches.size(blocks) == 96


def test_what_new_bytes_displace() -> None:
    caches = index(capacity=100)
    assert caches.displaced("w", 100) == 0
    assert caches.displaced("w", 130) == 30
    caches.remember("w", caches.blocks(b"a" * 64, ""))
    assert caches.displaced("w", 36) == 0
    assert caches.displaced("w", 50) == 14
    caches.resize("w", 10)
    assert caches.displaced("w", 50) == 40


@given(st.integers(16, 1_000_000))
def test_blocks_are_few_and_fine_enough_and_reach_far(block_bytes: int) -> None:
    ends = block_ends(block_bytes)
    assert ends[0] == block_bytes
    assert ends[-1] <= max(REACH_BYTES, block_bytes)
    assert len(ends) <= SAME_SIZE * 16
    assert all(later - earlier <= max(block_bytes, earlier / SAME_SIZE * 2) for earlier, later in pairwise(ends))
