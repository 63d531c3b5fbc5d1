"""Conversations: the same for the same seed, grown turn by turn, never the same under another mark."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

from loadtest.conversations import Workload, conversations

LOAD = Workload(conversations=4, turns=3, systems=2)


def test_the_same_seed_says_the_same_and_another_mark_is_another_prompt_from_the_start() -> None:
    one, same, other = (conversations(LOAD, 1, mark) for mark in ("x", "x", "y"))
    assert one == same
    assert len(one) == 4
    assert len({talk.messages[0]["content"] for talk in one}) == 2
    for mine, theirs in zip(one, other, strict=True):
        assert mine.questions == theirs.questions
        assert mine.messages[0]["content"][1:] == theirs.messages[0]["content"][1:]
        assert mine.messages[0]["content"][0] != theirs.messages[0]["content"][0]


def test_each_turn_begins_with_all_that_was_said() -> None:
    (talk, *_) = conversations(replace(LOAD, conversations=1), 1, "x")
    sent = []
    for turn in range(LOAD.turns):
        sent.append(json.dumps(talk.ask("m", 5)["messages"]))
        talk.hear(f"answer {turn}")
    assert not talk.questions
    for before, after in itertools.pairwise(sent):
        assert after.startswith(before.removesuffix("]"))
