import pytest

from loadtest.bench import Findings
from loadtest.figures import Figure
from loadtest.report import cell, figures_table, ratio_table, verdicts, with_section


def findings(**values: float) -> Findings:
    return Findings({Figure[name]: [value] for name, value in values.items()})


@pytest.mark.parametrize(
    ("values", "digits", "shown"),
    [
        (None, 1, "–"),
        ([], 1, "–"),
        ([1234.56], 0, "1,235"),
        ([3.0, 1.0, 2.0], 1, "2.0 (1.0–3.0)"),
    ],
)
def test_a_cell_shows_median_and_extremes(values: list[float] | None, digits: int, shown: str) -> None:
    assert cell(values, digits) == shown


def test_what_was_not_measured_is_a_dash() -> None:
    row = figures_table({"naive": findings(CPU_CHUNK=280.0), "sluice": Findings()})
    assert "| CPU per streamed chunk, streams staggered [µs] | 280.0 | – |" in row


def test_ratios_are_of_medians() -> None:
    shown = ratio_table({"naive": findings(CPU_CHUNK=200.0), "sluice": findings(CPU_CHUNK=50.0)}, "naive")
    assert shown is not None
    assert "| CPU per streamed chunk, streams staggered | 1.00 | 0.25 |" in shown


def test_no_ratios_without_a_yardstick() -> None:
    assert ratio_table({"sluice": findings(CPU_CHUNK=50.0)}, "naive") is None


@pytest.mark.parametrize(
    ("request_us", "chunk_us", "words"),
    [(200.0, 31.0, ("0.200, met", "0.310, missed")), (201.0, 30.0, ("0.201, missed", "0.300, met"))],
)
def test_verdicts_judge_the_ratio_and_not_its_rounding(
    request_us: float, chunk_us: float, words: tuple[str, str]
) -> None:
    results = {
        "naive": findings(CPU_REQUEST_1K=1000.0, CPU_CHUNK=100.0),
        "sluice": findings(CPU_REQUEST_1K=request_us, CPU_CHUNK=chunk_us),
    }
    assert all(line.endswith(end) for line, end in zip(verdicts(results), words, strict=False))


def test_no_verdict_without_both() -> None:
    assert all(line.endswith("not measured") for line in verdicts({"naive": findings(CPU_CHUNK=1.0)}))


def test_a_section_takes_the_place_of_the_one_with_its_heading_and_the_others_stay() -> None:
    document = with_section(with_section("", "# One\nfirst\n## Notes\nmore # of it\n"), "# Two\nsecond\n")
    assert document == "# One\nfirst\n## Notes\nmore # of it\n\n# Two\nsecond\n"
    assert with_section(document, "# Two\nsecond\n") == document
    assert with_section(document, "# One\nnew\n") == "# One\nnew\n\n# Two\nsecond\n"
