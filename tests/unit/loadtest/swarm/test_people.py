"""Who asks, and what."""

import random
from itertools import islice

import pytest

from loadtest.conversations import Workload
from loadtest.swarm.people import answer_tokens, callers, parse_bands, parse_keys, population, think_s


def test_keys_come_from_lines_or_commas() -> None:
    assert parse_keys("acme=sk-1, beta = sk=2\n# all\n\ngamma=sk-3 # theirs\n") == {
        "acme": "sk-1",
        "beta": "sk=2",
        "gamma": "sk-3",
    }


@pytest.mark.parametrize("text", ["sk-secret", "acme=", "=sk-secret"])
def test_a_wrong_key_is_told_without_showing_it(text: str) -> None:
    with pytest.raises(ValueError, match="key 2 is not of the form tenant=key") as told:
        parse_keys(f"ok=1,{text}")
    assert "secret" not in str(told.value)


def test_users_take_tenants_in_turn_and_bands_by_their_shares() -> None:
    many = list(islice(callers({"a": "1", "b": "2"}, parse_bands("priority=1,flex=3"), seed=1), 4000))
    assert [caller.tenant for caller in many[:4]] == ["a", "b", "a", "b"]
    assert sum(caller.band == "flex" for caller in many) / 4000 == pytest.approx(0.75, abs=0.03)
    assert next(callers({}, {"default": 1}, seed=1)).key == ""


@pytest.mark.parametrize("text", ["", "gold=1", "flex=0", "flex=x", "flex=-1,default=3"])
def test_bands_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"band|float"):
        parse_bands(text)


def test_conversations_share_system_prompts_and_no_question() -> None:
    talks = list(islice(population(Workload(6, 2, systems=3), seed=1), 30))
    assert len({talk.messages[0]["content"] for talk in talks}) == 3
    assert len({question for talk in talks for question in talk.questions}) == 60


def test_pauses_and_lengths_are_bounded() -> None:
    source = random.Random(1)  # noqa: S311 - no secret
    pauses = [think_s(source, 2.0) for _ in range(5000)]
    assert sum(pauses) / 5000 == pytest.approx(2.0, rel=0.1)
    assert max(pauses) <= 10
    assert think_s(source, 0) == 0
    lengths = {answer_tokens(source, 40) for _ in range(2000)}
    assert (min(lengths), max(lengths)) == (20, 80)
    assert answer_tokens(source, 1) >= 1
