"""The page and its picture, from cards alone."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from app.card import Card, GateFailure, MeasuredOn, Speed, Uncertainty, UncertaintyStep, Verdict
from app.evaluation.document import document
from app.evaluation.page import Row, figures, page
from app.evaluation.radar import Figure, radar, ratios
from tests.unit.cards import card, quality

SVG = "{http://www.w3.org/2000/svg}"


def speeds(lone: float, busy: float, ttft: float = 0.1) -> tuple[Speed, ...]:
    return (
        Speed(streams=1, ttft_p50_s=ttft, itl_p50_s=1 / lone, tokens_per_s=lone),
        Speed(streams=8, ttft_p50_s=ttft * 2, itl_p50_s=8 / busy, tokens_per_s=busy),
    )


DENSE = Row("dense", "dense", card(quality(1.0, kl=0, top1=1), speed=speeds(20, 100), memory_bytes=2_000_000_000))
SMALL = Row(
    "w8a8",
    "w8a8",
    card(
        quality(0.92, kl=0.08, tasks={"retrieval": (0.8, 1.0)}),
        speed=speeds(10, 50, ttft=0.05),
        memory_bytes=1_000_000_000,
        uncertainty=(
            Uncertainty(
                measure="entropy",
                window_tokens=8,
                top_logprobs=5,
                items=10,
                table=(
                    UncertaintyStep(threshold=0, escalated_share=1, expected_quality=1, agreement=1),
                    UncertaintyStep(threshold=0.5, escalated_share=0.3, expected_quality=0.98, agreement=0.9),
                    UncertaintyStep(threshold=1, escalated_share=0, expected_quality=0.8, agreement=0.7),
                ),
            ),
        ),
    ),
)
REFUSED = Row("w4a16", "w4a16", card(reason="ValueError: no kernel for uint4b8 | here"))
FAILING = Row(
    "depth8",
    "depth8",
    card(
        quality(0.2),
        speed=speeds(90, 900),
        gate=Verdict(passed=False, failed=(GateFailure(threshold="min_quality", limit=0.5, value=0.2),)),
    ),
)
ROWS = [DENSE, SMALL, REFUSED, FAILING]


def test_the_picture_is_well_formed_and_names_every_variant() -> None:
    picture = ElementTree.fromstring(radar(figures([*ROWS, Row("a<&>b", "r", SMALL.card)])))  # noqa: S314 - our own
    texts = "".join(picture.itertext())
    assert all(name in texts for name in ("w8a8", "w4a16", "depth8", "a<&>b"))
    width, height = (float(picture.get(side) or 0) for side in ("width", "height"))
    for polygon in picture.iter(f"{SVG}polygon"):
        for point in (polygon.get("points") or "").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_ratios_are_larger_where_a_variant_is_better() -> None:
    assert ratios(SMALL.card, DENSE.card) == {
        "quality": 0.92,
        "first token": 2.0,
        "tokens/s": 0.5,
        "tokens per $": 0.5,
        "memory": 2.0,
        "size": 1.0,
    }


def test_what_was_not_measured_is_said_and_drawn_as_nothing() -> None:
    found = ratios(REFUSED.card, DENSE.card)
    assert found["quality"] is None
    assert "not measured" in radar([Figure("x", "", found)])


def test_an_empty_picture_is_still_one() -> None:
    assert ElementTree.fromstring(radar([])).tag == f"{SVG}svg"  # noqa: S314 - our own


def test_advice_names_only_what_is_served_and_passes_its_gate() -> None:
    advice = page("smollm2", ROWS, "variants.svg").partition("![")[0]
    assert "| One user at a time | `dense` |" in advice
    assert "| Long prompts, quick first token | `w8a8` |" in advice
    assert "depth8" not in advice
    assert "w4a16" not in advice


def measured_beside(others: float | None) -> Row:
    machine = MeasuredOn(
        cores=2, instruction_set="avx2", engine="cpu", engine_version="1", taken_by_others=others
    )  # fmt: skip
    return Row("dense", "dense", DENSE.card.model_copy(update={"machine": machine}))


def test_speed_of_a_machine_that_others_used_is_called_no_comparison() -> None:
    disturbed = page("m", [measured_beside(0.85)], "p.svg")
    assert "others took 85% of the cores" in disturbed
    assert "You want" not in disturbed
    assert "You want" in page("m", [measured_beside(0.02)], "p.svg")
    assert "no comparison" not in page("m", [measured_beside(0.02)], "p.svg")
    assert "no comparison" not in page("m", [measured_beside(None)], "p.svg")


def test_cards_of_different_runs_are_not_passed_off_as_one() -> None:
    other = Row("w8a8", "w8a8", DENSE.card.model_copy(update={"seed": 2}))
    assert "not of the same text, seed and items" in page("m", [DENSE, other], "p.svg")
    assert "not of the same text" not in page("m", [DENSE, DENSE], "p.svg")


def test_what_was_slower_is_in_words() -> None:
    text = page("smollm2", ROWS, "variants.svg")
    assert "- `w8a8`: tokens/s 0.50×, tokens per $ 0.50×" in text
    assert "- `depth8`" not in text.partition("## Quality")[0].partition("Worse than")[2]


def test_a_refusal_is_told_in_the_engines_words() -> None:
    assert "- `w4a16`: ValueError: no kernel for uint4b8 | here" in page("smollm2", ROWS, "p.svg")


def test_failing_its_gate_shows_what_was_missed() -> None:
    assert "min_quality 0.5, measured 0.2" in page("smollm2", ROWS, "p.svg")


def test_a_cascades_cheapest_good_step_is_shown() -> None:
    assert "| `w8a8` | 0.5 | 30% | 0.98 | 0.80 |" in page("smollm2", ROWS, "p.svg")


@pytest.mark.parametrize("rows", [ROWS, [DENSE], [Row("dense", "dense", card())]])
def test_every_table_has_as_many_cells_in_each_line(rows: list[Row]) -> None:
    blocks = [block for block in page("m", rows, "p.svg").split("\n\n") if block.startswith("| ")]
    for block in blocks:
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1, block


def test_a_card_that_came_from_json_makes_the_same_page() -> None:
    again = [Row(row.variant, row.recipe, Card.model_validate_json(row.card.model_dump_json())) for row in ROWS]
    assert page("m", again, "p.svg") == page("m", ROWS, "p.svg")


def test_the_document_holds_its_picture_and_quotes_engines_as_text() -> None:
    refused = Row("w4a16", "w4a16", card(reason="ValueError: <script>no</script>"))
    picture = radar(figures([DENSE, SMALL, refused]))
    found = document(page("smollm2", [DENSE, SMALL, refused], "variants.svg"), "variants.svg", picture)
    assert found.startswith("<!doctype html>")
    assert picture in found
    assert "<title>smollm2: which variant should I run?</title>" in found
    assert found.count("<table>") == found.count("</table></div>") >= 3
    assert '0.92 <span class="interval">(0.92–0.92)</span></td>' in found
    assert "&lt;script&gt;no&lt;/script&gt;" in found
    assert "<script>" not in found
    assert "<img" not in found


def test_the_page_tells_only_of_what_was_measured() -> None:
    text = page(
        "m", [Row("dense", "dense", card(quality(1.0))), Row("moe", "moe", card(reason="KeyError: no"))], "p.svg"
    )
    how = text.partition("## How it was measured")[2]
    assert "no tasks, so that the text alone decides" in how
    assert "Speed" not in how
    assert "Machine" not in how
    assert "\n| `moe` | not measured | – | – |" in text
