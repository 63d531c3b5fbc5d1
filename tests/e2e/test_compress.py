"""`sluice compress` as a process: what is left of a run that ends well, fails, is interrupted, or is killed.

A stand-in takes the place of the recipes' interpreter, in a home of its own; tests/recipes runs the real one.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from app.launcher.environments import RECIPES, STAMP, Installer
from app.launcher.home import Home
from tests.processes import Process

END_S = 120.0
# Writes half of its work, and then ends as it is told: well, badly, or not at all.
STAND_IN = """#!{python}
import json, sys, time
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
(output / "half").write_text("written")
Path({begun!r}).write_text("")
if {end!r} == "fail":
    print(json.dumps({{"error": "the recipe's own words"}}), flush=True)
    sys.exit(1)
if {end!r} == "hang":
    time.sleep(600)
"""


@dataclass(frozen=True)
class Kitchen:
    """A home whose recipes environment is the stand-in, a base, and where the result goes."""

    home: Home
    base: Path
    output: Path

    @property
    def begun(self) -> Path:
        return self.home.root / "begun"

    def put_recipes(self, end: str) -> None:
        python = self.home.environment(RECIPES.name) / "bin" / "python"
        python.write_text(STAND_IN.format(python=sys.executable, begun=str(self.begun), end=end))
        python.chmod(0o755)

    def compress(self) -> Process:
        command = [sys.executable, "-m", "app", "compress", str(self.base), "--recipe", "w8a8"]
        return Process([*command, "--output", str(self.output), "--home", str(self.home.root)], {**os.environ})

    def left(self) -> list[str]:
        return sorted(path.name for path in self.output.parent.iterdir())

    def wait_until_begun(self, process: Process) -> None:
        process.wait_for_line(r"Making base:w8a8", END_S)
        recipe = psutil.Process(process.pid)
        while not self.begun.exists():
            assert recipe.is_running()
            psutil.wait_procs([recipe], timeout=0.05)


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    home = Home(tmp_path / "home")
    environment = home.environment(RECIPES.name)
    (environment / "bin").mkdir(parents=True)
    (environment / STAMP).write_text(Installer.of_this_machine().fingerprint(RECIPES))
    base, shelf = tmp_path / "base", tmp_path / "shelf"
    for directory in (base, shelf):
        directory.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    return Kitchen(home, base, shelf / "out")


def test_a_run_that_ends_well_leaves_its_output_alone(kitchen: Kitchen) -> None:
    kitchen.put_recipes("well")
    with kitchen.compress() as process:
        assert process.wait(END_S) == 0
    assert kitchen.left() == ["out"]
    assert (kitchen.output / "half").exists()


def test_a_recipe_that_fails_is_one_line_and_leaves_nothing(kitchen: Kitchen) -> None:
    kitchen.put_recipes("fail")
    with kitchen.compress() as process:
        assert process.wait(END_S) == 1
        assert "error: the recipe's own words" in process.output
    assert kitchen.left() == []


def test_an_interrupted_run_leaves_nothing(kitchen: Kitchen) -> None:
    kitchen.put_recipes("hang")
    with kitchen.compress() as process:
        kitchen.wait_until_begun(process)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(END_S) == 1
        assert "error: interrupted" in process.output
    assert kitchen.left() == []


def test_what_a_killed_run_leaves_is_cleared_by_the_next(kitchen: Kitchen) -> None:
    kitchen.put_recipes("hang")
    with kitchen.compress() as process:
        kitchen.wait_until_begun(process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(END_S)
    assert [name.startswith(".out.partial-") for name in kitchen.left()] == [True]
    kitchen.put_recipes("well")
    with kitchen.compress() as process:
        assert process.wait(END_S) == 0
    assert kitchen.left() == ["out"]
