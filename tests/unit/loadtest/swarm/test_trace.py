"""Traces in the public formats, cut, and made up. The samples are written in the formats' own way."""

import pytest

from loadtest.swarm.trace import Arrival, TraceError, convert, encode, prompt, synthetic, window

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
60,GPT-4,12,0,12,API log
118,GPT-4,417,276,693,Conversation log
"""
BURSTGPT_3 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
0.5,a1,2.25,ChatGPT,10,20,30,API log
"""
AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51,396,0
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-12 00:00:00.009930+00:00,2162,5
2024-05-12 00:00:00.5+00:00,2399,6
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]}
{"timestamp": 2500, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 2]}

{"timestamp": 3000, "input_length": 600, "output_length": 3}
"""


def arrivals(text: str) -> list[Arrival]:
    return window(convert(text.splitlines(keepends=True)))


def test_burstgpt_counts_in_seconds_and_leaves_out_failures() -> None:
    assert arrivals(BURSTGPT) == [Arrival(0, 472, 18), Arrival(40, 1087, 230), Arrival(113, 417, 276)]
    assert arrivals(BURSTGPT_3) == [Arrival(0, 10, 20)]


def test_azure_has_times_of_the_day() -> None:
    first, second = arrivals(AZURE_2023)
    assert (first.prompt_tokens, first.answer_tokens, second.prompt_tokens) == (374, 44, 396)
    assert second.at_s == pytest.approx(4.314579, abs=1e-5)
    assert arrivals(AZURE_2024)[1].at_s == pytest.approx(0.49007, abs=1e-5)


def test_mooncake_counts_in_milliseconds_and_names_blocks() -> None:
    assert arrivals(MOONCAKE) == [Arrival(0, 1000, 5, (0, 1)), Arrival(2.5, 1100, 7, (0, 1, 2)), Arrival(3, 600, 3)]


def test_a_byte_order_mark_is_passed_over() -> None:
    assert arrivals("\ufeff" + BURSTGPT) == arrivals(BURSTGPT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither"),
        ("when,what\n1,2\n", "neither"),
        (BURSTGPT + "soon,ChatGPT,1,1,2,API log\n", "line 6"),
        (AZURE_2023 + "yesterday,1,1\n", "line 5"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 5"),
        ("Timestamp,Request tokens\n1,2\n", "line 2"),
    ],
)
def test_what_is_no_trace_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        arrivals(text)


def test_a_window_is_cut_hastened_and_limited() -> None:
    found = window(convert(BURSTGPT.splitlines()), begin_s=40, lasts_s=100, speed=2, prompt_limit=500, answer_limit=250)
    assert found == [Arrival(0, 500, 230), Arrival(36.5, 417, 250)]
    assert len(window(convert(BURSTGPT.splitlines()), most=2)) == 2


def test_what_is_written_is_read_again() -> None:
    made = synthetic(30, 2, seed=4)
    assert window(convert(encode(made))) == window(made)


def test_prompts_are_as_long_as_asked_and_share_what_their_blocks_share() -> None:
    first, second, alone = (
        prompt(arrival, 1) for arrival in (Arrival(0, 700, 1, (3, 4)), Arrival(1, 900, 1, (3, 5)), Arrival(2, 700, 1))
    )
    assert len(first.split()) == 700
    assert len(second.split()) == 900
    assert first.split()[:512] == second.split()[:512]
    assert first.split()[512:700] != second.split()[512:700]
    assert alone.split()[:50] != first.split()[:50]
    assert prompt(Arrival(2, 700, 1), 1) == alone


def test_a_made_up_trace_is_bursty_bounded_and_repeatable() -> None:
    made = synthetic(600, 2, seed=1)
    assert made == synthetic(600, 2, seed=1)
    assert 900 < len(made) < 1500
    assert all(0 <= a.at_s < 600 and a.prompt_tokens <= 3 * 512 + 2000 and a.answer_tokens <= 400 for a in made)
    shared = sum(any(a.blocks[0] == b.blocks[0] for b in made[:at]) for at, a in enumerate(made))
    assert 0.2 < shared / len(made) < 0.5
