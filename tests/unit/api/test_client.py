"""How long a client may not read, in time that is not real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from app.api.client import ClientGone, ClientWatch
from app.served import Served
from tests.stepping import SteppingLoop

STALL_S = 30.0


class Peer:
    """A connection whose client keeps up, or does not, when the test says so."""

    on_disconnect: Callable[[], None] | None = None
    on_stall: Callable[[], None] | None = None
    paused_since: float | None = None
    aborted = False

    def abort(self) -> None:
        self.aborted = True

    def pause(self, now: float) -> None:
        self.paused_since = now
        if self.on_stall is not None:
            self.on_stall()


@pytest.fixture
def loop() -> Iterator[SteppingLoop]:
    loop = SteppingLoop()
    yield loop
    loop.close()


async def watched(peer: Peer, served_s: float) -> float:
    """Serve `peer` for so long; when its client was given up. Raises AssertionError if it was not."""
    loop = asyncio.get_running_loop()
    try:
        with ClientWatch(peer, STALL_S, Served(), None):
            await asyncio.sleep(served_s)
    except ClientGone:
        return loop.time()
    raise AssertionError


def test_a_client_is_given_up_when_it_has_not_read_for_the_limit(loop: SteppingLoop) -> None:
    peer = Peer()
    loop.call_at(10.0, lambda: peer.pause(loop.time()))
    assert loop.run_until_complete(watched(peer, 100.0)) == 10.0 + STALL_S
    assert peer.aborted


def test_a_client_that_did_not_read_before_its_answer_began_is_watched_too(loop: SteppingLoop) -> None:
    peer = Peer()
    peer.paused_since = -20.0
    assert loop.run_until_complete(watched(peer, 100.0)) == STALL_S


def test_the_limit_is_of_one_stall_and_not_from_the_first_on(loop: SteppingLoop) -> None:
    peer = Peer()
    loop.call_at(10.0, lambda: peer.pause(loop.time()))
    loop.call_at(20.0, lambda: setattr(peer, "paused_since", None))
    loop.call_at(25.0, lambda: peer.pause(loop.time()))
    assert loop.run_until_complete(watched(peer, 100.0)) == 25.0 + STALL_S


def test_a_client_that_reads_again_is_served(loop: SteppingLoop) -> None:
    peer = Peer()
    loop.call_at(10.0, lambda: peer.pause(loop.time()))
    loop.call_at(20.0, lambda: setattr(peer, "paused_since", None))
    with pytest.raises(AssertionError):
        loop.run_until_complete(watched(peer, 100.0))
    assert (loop.now, peer.aborted) == (100.0, False)
