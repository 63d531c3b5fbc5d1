"""How many users there are at each second."""

import pytest

from loadtest.swarm.shapes import NAMES, shape


def users(name: str, *at_s: float) -> list[int | None]:
    made = shape(name, 2, 10, 100.0, steps=5, day_s=50.0)
    return [made.users(at) for at in at_s]


def test_a_step_goes_up_in_equal_steps() -> None:
    assert users("step", 0, 19.9, 20, 40, 60, 80, 99.9) == [2, 2, 4, 6, 8, 10, 10]


def test_a_spike_is_the_middle_fifth() -> None:
    assert users("spike", 0, 39.9, 40, 59.9, 60, 99) == [2, 2, 10, 10, 2, 2]


def test_a_day_has_its_noon_in_the_middle() -> None:
    assert users("diurnal", 0, 12.5, 25, 37.5, 50, 75) == [2, 6, 10, 6, 2, 10]


def test_steady_is_steady() -> None:
    assert users("steady", 0, 50, 99.9) == [10, 10, 10]


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_ends(name: str) -> None:
    assert users(name, 100, 1000) == [None, None]


@pytest.mark.parametrize(
    "given", [("square", 0, 1, 1.0), ("step", 3, 2, 1.0), ("step", 0, 0, 1.0), ("spike", 0, 1, 0.0)]
)
def test_a_shape_that_cannot_be_is_refused(given: tuple[str, int, int, float]) -> None:
    with pytest.raises(ValueError, match="load shape"):
        shape(*given, steps=4, day_s=60)
