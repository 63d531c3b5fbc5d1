"""What recipes decide from what they measured."""

from __future__ import annotations

import pytest

from app.errors import LaunchError
from app.recipes.choice import blocks_to_keep, group_size, heads_to_keep, most, uniform_heads, uniform_width, windows


def test_the_least_influential_blocks_go_and_the_ends_stay() -> None:
    influence = [0.0, 0.5, 0.1, 0.2, 0.3, 0.0]
    assert blocks_to_keep(influence, keep=4, drop=0) == [0, 1, 4, 5]
    assert blocks_to_keep(influence, keep=0, drop=1) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(("keep", "drop"), [(6, 0), (1, 0), (0, 0), (0, 5), (7, 0), (0, -1)])
def test_a_depth_that_drops_nothing_or_nearly_everything_is_refused(keep: int, drop: int) -> None:
    with pytest.raises(LaunchError, match="a model of 6 blocks cannot be pruned to"):
        blocks_to_keep([0.1] * 6, keep, drop)


def test_a_width_is_a_share_in_whole_multiples() -> None:
    assert uniform_width(1536, 0.75, 64) == 1152
    assert uniform_width(1000, 0.5, 64) == 512


@pytest.mark.parametrize(("share", "multiple"), [(0.0, 64), (1.0, 64), (0.99, 64), (0.01, 64), (0.5, 0)])
def test_a_width_that_cuts_nothing_or_everything_is_refused(share: float, multiple: int) -> None:
    with pytest.raises(LaunchError):
        uniform_width(256, share, multiple)


def test_heads_go_evenly_from_all_groups_or_with_their_group() -> None:
    importance = [1.0, 5.0, 4.0, 9.0, 1.0, 8.0, 2.0, 3.0, 3.0]
    assert uniform_heads(9, 3, 0.75, whole=False) == (6, 3)
    assert heads_to_keep(importance, 3, (6, 3)) == [1, 2, 3, 5, 7, 8]
    assert uniform_heads(9, 3, 0.75, whole=True) == (6, 2)
    assert heads_to_keep(importance, 3, (6, 2)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("groups", "share", "whole"), [(3, 0.9, False), (3, 0.1, True), (9, 0.5, False)])
def test_heads_that_all_stay_or_all_go_are_refused(groups: int, share: float, whole: bool) -> None:
    with pytest.raises(LaunchError, match="can stay"):
        uniform_heads(9, groups, share, whole=whole)


def test_the_highest_values_first_and_of_equal_ones_the_first() -> None:
    assert most([1.0, 3.0, 2.0, 3.0], 2) == [1, 3]
    assert most([1.0, 1.0, 1.0], 2) == [0, 1]


def test_a_group_divides_every_layer() -> None:
    assert group_size([576, 1536], 0) == 64
    assert group_size([512, 1024], 0) == 128
    assert group_size([576], 96) == 96
    with pytest.raises(LaunchError, match="groups of 128 do not divide the layers' 576, 1536 columns"):
        group_size([576, 1536, 576], 128)
    with pytest.raises(LaunchError, match="groups of 128, 64, 32 do not divide"):
        group_size([100], 0)


def test_samples_are_whole_and_as_many_as_there_are() -> None:
    assert windows(range(10), 3, 2) == [[0, 1, 2], [3, 4, 5]]
    assert windows(range(10), 3, 9) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(LaunchError, match="has 2 tokens, one sample alone needs 3"):
        windows(range(2), 3, 1)
