"""Lines take what is left over, and give it back at once."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from app.batches.slack import Seen, Slack

IDLE = Seen(slots=64, free=64, interactive=0, waiting=0, lines_waiting=0, ttft_s=None)


def look(slack: Slack, seen: Seen, in_flight: int) -> Slack:
    return slack.look(seen, in_flight, most=256, ttft_target_s=1.0)


def settled(interactive: int, slots: int = 64) -> tuple[Slack, int]:
    """After a minute under a steady load: the slack, and the lines that hold a slot."""
    slack, lines = Slack(), 0
    for _ in range(120):
        queued = max(0, lines - (slots - interactive))
        seen = Seen(slots, max(0, slots - interactive - lines), interactive, 0, queued, 0.1)
        slack = look(slack, seen, lines)
        lines = slack.limit
    return slack, min(lines, slots - interactive)


def test_lines_fill_what_is_idle() -> None:
    assert settled(0)[1] == 64
    for interactive in (4, 20, 40):
        _, lines = settled(interactive)
        assert lines >= 0.9 * (64 - interactive)


def test_a_request_that_waits_halves_the_lines_at_once() -> None:
    slack = look(Slack(limit=60), replace(IDLE, free=0, waiting=1), 60)
    assert slack.limit == 30
    for _ in range(5):
        slack = look(slack, replace(IDLE, free=0, waiting=1), slack.limit)
    assert slack.limit == 0


def test_a_slow_first_token_does_too() -> None:
    assert look(Slack(limit=60), replace(IDLE, ttft_s=1.1), 60).limit == 30
    assert look(Slack(limit=10), replace(IDLE, ttft_s=0.9), 10).limit > 10


def test_room_is_left_for_the_recent_peak() -> None:
    slack, peaked = Slack(limit=10, peak=9.0), replace(IDLE, slots=32, free=3, interactive=4)
    assert look(slack, peaked, 25).limit < 28
    assert look(Slack(limit=10), replace(peaked, interactive=0), 25).limit == 27


@given(
    st.integers(0, 300), st.integers(0, 300), st.integers(0, 64), st.integers(0, 64), st.integers(0, 5),
    st.integers(0, 300), st.none() | st.floats(0, 5),
)  # fmt: skip
def test_never_more_than_allowed_and_never_more_than_is_free(
    limit: int, in_flight: int, free: int, interactive: int, waiting: int, lines_waiting: int, ttft_s: float | None
) -> None:
    seen = Seen(64, free, interactive, waiting, lines_waiting, ttft_s)
    after = look(Slack(limit=limit), seen, in_flight)
    assert 0 <= after.limit <= 300
    assert after.limit <= max(in_flight + free + 1, 1)
