"""What a run comes to, and its page."""

import xml.etree.ElementTree as ET

import pytest

from loadtest.swarm.answer import Record
from loadtest.swarm.figures import SLOS, figures, goals
from loadtest.swarm.page import BUCKETS, chart, in_flight, page

SERVED = [
    Record(100.0 + i, "chat", "default", "acme", 200, "", 0.1 * (i + 1), 1.0 + 0.1 * i, (0.2, 0.3), 9, 3)
    for i in range(10)
]
REFUSED = Record(103.0, "chat", "flex", "<b>", 503, "overloaded", None, 0.01)
FAILED = Record(104.0, "chat", "priority", "", 200, "lost", 0.2, 0.4, (0.1,), 0, 2)
BATCH = Record(100.0, "batch", "batch", "", 200, took_s=500.0, tokens=7000)
ALL = [*SERVED, REFUSED, FAILED, BATCH]


def test_refusals_and_errors_are_counted_by_code_and_apart() -> None:
    seen = figures([*SERVED, REFUSED, FAILED])
    assert (seen.asked, seen.served) == (12, 10)
    assert seen.refusals == {"503 overloaded": 1}
    assert seen.errors == {"200 lost": 1}
    assert seen.error_share == pytest.approx(1 / 12)
    assert seen.tokens == 30


@pytest.mark.parametrize(
    ("name", "target", "is_met"),
    [
        ("ttft_p95_s", 1.0, True),
        ("ttft_p95_s", 0.99, False),
        ("itl_p95_s", 0.3, True),
        ("itl_p95_s", 0.2, False),
        ("error_share", 0.09, True),
        ("error_share", 0.08, False),
        ("refused_share", 0.0, False),
        ("e2e_p95_s", 1.9, True),
        ("tokens_per_s", 2.7, True),
        ("tokens_per_s", 2.8, False),
    ],
)
def test_goals_are_met_or_not_and_batches_have_no_part_in_them(name: str, target: float, is_met: bool) -> None:
    (goal,) = goals(ALL, {name: target})
    assert goal.is_met is is_met


def test_without_samples_no_latency_is_met() -> None:
    assert not any(goal.is_met for goal in goals([], {name: 1.0 for name in SLOS if name != "tokens_per_s"}))


def test_the_page_says_all_of_it_and_is_well_formed() -> None:
    text = page("A & B", ALL, goals(ALL, {"ttft_p95_s": 0.5, "e2e_p95_s": 9}))
    assert "A &amp; B" in text
    assert "12 requests in 10.9 s: 10 served, 1 refused, 1 failed" in text
    assert text.count('class="missed"') == 1
    assert "503 overloaded" in text
    assert "<b>" not in text
    drawings = [part.partition("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]
    marks = [ET.fromstring("<svg" + part) for part in drawings]  # noqa: S314 - our own
    assert len(marks) == 4
    assert len(marks[0].findall("{*}g/{*}circle")) == 12


@pytest.mark.parametrize("records", [[BATCH], [REFUSED], [SERVED[0]]])
def test_small_runs_have_a_page(records: list[Record]) -> None:
    assert page("small", records, []).endswith("</html>\n")


def test_in_flight_is_the_mean_of_each_bucket() -> None:
    held = in_flight([Record(0.5, "chat", took_s=2.0), Record(2.0, "chat", took_s=0.5)], 0.0, 1.0)
    assert held[:4] == pytest.approx([0.5, 1.0, 1.0, 0.0])
    assert len(held) == BUCKETS


def test_a_chart_stays_inside_its_frame() -> None:
    drawn = ET.fromstring(chart("x", {"a": [0.0, 7.0, 3.0], "b": [0.0, 0.0, 0.0]}, 1.0))  # noqa: S314 - our own
    (line,) = drawn.findall("{*}polyline")
    heights = [float(point.partition(",")[2]) for point in line.get("points", "").split()]
    assert max(heights) == 140.0
    assert min(heights) == pytest.approx(30 + 110 * 0.3)
