"""Panels of points as SVG."""

import xml.etree.ElementTree as ET

import pytest

from loadtest.scenarios.picture import HEIGHT, WIDTH, Panel, Point, Scale, panels

POINTS = [Point(0, 0.02, "a"), Point(50, 2.0, "b"), Point(100, 0.5, "a", is_open=True)]


def test_the_scale_spans_whole_decades() -> None:
    scale = Scale.of(POINTS)
    assert scale.decades == [pytest.approx(value) for value in (0.01, 0.1, 1, 10)]
    assert [scale.y(value) for value in (0.01, 10)] == [HEIGHT, 0]
    assert [scale.x(at) for at in (0, 100)] == [0, WIDTH]


def test_every_point_is_drawn_inside_and_open_ones_are_rings() -> None:
    picture = panels("A & B", [Panel("left", POINTS), Panel("right", POINTS[:1])], ("a", "b"))
    drawn = ET.fromstring(picture)  # noqa: S314 - our own
    groups = drawn.findall("{*}g")
    marks = [group.findall("{*}circle") for group in groups]
    assert [len(found) for found in marks] == [3, 1]
    assert all(0 <= float(mark.get("cx", "-1")) <= WIDTH for found in marks for mark in found)
    assert sum(mark.get("fill") == "none" for mark in marks[0]) == 1
    assert "A & B" in "".join(drawn.itertext())
