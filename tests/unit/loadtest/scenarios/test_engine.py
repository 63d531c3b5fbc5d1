"""The modelled engine: who computes when, and how long a step takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.scenarios.engine import Engine, EngineShape, Sequence

SHAPE = EngineShape(
    max_num_seqs=2,
    max_num_batched_tokens=64,
    kv_tokens=100,
    step_s=1.0,
    step_s_per_sequence=0.1,
    step_s_per_prompt_token=0.01,
)


def sequence(name: str, prompt: int = 10, output: int = 2) -> Sequence:
    return Sequence(name, prompt, output)


def run(engine: Engine, limit: int = 1000) -> list[tuple[str, float]]:
    """Every token until the engine has no work, as (sequence, time)."""
    found: list[tuple[str, float]] = []
    for _ in range(limit):
        if engine.due is None:
            return found
        found += [(token.sequence.id, round(token.at, 6)) for token in engine.advance(engine.due)]
    raise AssertionError("the engine does not come to an end")


def test_a_step_takes_what_its_sequences_and_prompt_tokens_take() -> None:
    engine = Engine(SHAPE)
    engine.add(sequence("a"), 5.0)
    assert run(engine) == [("a", 6.2), ("a", 7.3)]
    assert (engine.due, engine.running, engine.waiting) == (None, 0, 0)


def test_two_decode_together_and_the_third_waits_for_a_seat() -> None:
    engine = Engine(SHAPE)
    for name in "abc":
        engine.add(sequence(name), 0.0)
    # `a` is alone in the first step, `b` joins the second, `c` takes the seat of `a`.
    assert run(engine) == [("a", 1.2), ("a", 2.5), ("b", 2.5), ("b", 3.8), ("c", 3.8), ("c", 4.9)]
    assert engine.waiting_most == 2 - 1


def test_a_prompt_above_the_budget_is_computed_in_chunks() -> None:
    engine = Engine(SHAPE)
    engine.add(sequence("a", prompt=80, output=1), 0.0)
    assert run(engine) == [("a", round(1 + 0.1 + 0.64 + 1 + 0.1 + 0.16, 6))]


def test_a_full_cache_keeps_who_waits_waiting() -> None:
    engine = Engine(SHAPE)
    engine.add(sequence("a", prompt=60, output=2), 0.0)
    engine.add(sequence("b", prompt=60, output=1), 0.0)
    engine.advance(2.9)
    assert (engine.running, engine.waiting) == (1, 0)
    assert engine.preemptions == 0


def test_the_youngest_is_preempted_and_computes_again() -> None:
    engine = Engine(SHAPE)
    engine.add(sequence("old", prompt=48, output=8), 0.0)
    engine.add(sequence("new", prompt=48, output=8), 0.0)
    tokens = run(engine)
    assert engine.preemptions >= 1
    assert sorted(name for name, _ in tokens) == ["new"] * 8 + ["old"] * 8
    assert tokens[-1][0] == "new"


def test_who_looks_late_loses_nothing() -> None:
    prompt, late = Engine(SHAPE), Engine(SHAPE)
    for engine in (prompt, late):
        engine.add(sequence("a", output=5), 0.0)
    tokens = late.advance(100.0)
    assert [(token.sequence.id, round(token.at, 6)) for token in tokens] == run(prompt)
    assert [(token.number, token.is_last) for token in tokens] == [(number, number == 5) for number in range(1, 6)]


def test_an_aborted_sequence_gives_its_seat_away() -> None:
    engine = Engine(SHAPE)
    gone, waits = sequence("gone", output=50), sequence("waits", output=1)
    for one in (gone, sequence("b", output=50), waits):
        engine.add(one, 0.0)
    engine.advance(3.0)
    assert engine.waiting == 1
    engine.abort(gone)
    engine.abort(gone)
    tokens = engine.advance(5.5)
    assert "gone" not in {token.sequence.id for token in tokens}
    assert waits.is_done


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="whole cache"):
        Engine(SHAPE).add(sequence("a", prompt=90, output=20), 0.0)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60), st.integers(1, 20)), max_size=25))
def test_everybody_gets_all_tokens_within_seats_and_cache(arrivals: list[tuple[float, int, int]]) -> None:
    engine, made, tokens = Engine(SHAPE), [], 0
    for number, (at, prompt, output) in enumerate(sorted(arrivals)):
        while engine.due is not None and engine.due <= at:
            tokens += len(engine.advance(engine.due))
            assert engine.running <= SHAPE.max_num_seqs
            assert engine.kv_usage <= 1
        made.append(Sequence(str(number), prompt, output))
        engine.add(made[-1], at)
    tokens += len(run(engine))
    assert all(one.generated == one.output_tokens for one in made)
    assert tokens == sum(output for *_, output in arrivals) == engine.generated
