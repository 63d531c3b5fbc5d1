"""`sluice compress`: the list, and what it refuses before anything is installed or read."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from app.cli import main
from app.recipes.calibration import LEAST_CHARS


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["compress", *arguments])
    return result.exit_code, result.output


def test_the_list_shows_recipes_chains_and_who_cannot_serve_them() -> None:
    status, output = run("--list")
    assert status == 0
    for shown in (
        "w4a16-awq",
        "an accelerator",
        "depth26+w8a8",
        "GPU only",
        "No Int8 MoE backend",
        "keep=26",
        "steps=40",
    ):
        assert shown in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "nope"), "error: no recipe 'nope'; there are: dense"),
        (("--recipe", "w8a8+depth"), "error: recipe 'w8a8+depth': nothing can follow 'w8a8'"),
        (("--recipe", "depth", "--parameter", "kep=3"), "error: recipe 'depth' has no parameter 'kep'; it has: keep"),
        (("--recipe", "depth", "--parameter", "keep=x"), "error: parameter 'keep' takes a value of type int"),
        (("--recipe", "depth", "--parameter", "keep"), "error: --parameter keep: expected NAME=VALUE"),
        (("--recipe", "depth", "--calibration", "/nowhere/text"), "error: --calibration /nowhere/text: No such file"),
        (("--recipe", "w8a8", "--calibration", "/nowhere/text"), "error: --calibration: recipe 'w8a8' needs no text"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    status, output = run("smollm2", *options, "--output", str(tmp_path / "out"), "--home", str(tmp_path / "home"))
    assert (status, output.count("\n")) == (2, 1)
    assert output.startswith(message)
    assert not (tmp_path / "home").exists()


def test_a_text_that_is_too_short_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("short")
    status, output = run(
        "smollm2", "--recipe", "depth", "--calibration", str(tmp_path / "text"), "--output", str(tmp_path / "out")
    )
    assert (status, output.count("\n")) == (2, 1)
    assert f"too short, it has 5 characters and {LEAST_CHARS} are needed" in output


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    status, output = run("smollm2", "--recipe", "w8a8", "--output", str(tmp_path), "--home", str(tmp_path / "home"))
    assert (status, output.count("\n")) == (2, 1)
    assert "exists and is not an empty directory" in output
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
