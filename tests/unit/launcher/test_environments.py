"""pip's configuration in uv's words; an environment is current only when it was finished from the same lock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from app.errors import LaunchError
from app.launcher.environments import (
    RECIPES,
    STAMP,
    WORKER_CPU,
    Installer,
    Sources,
    locks_directory,
)
from app.launcher.home import Home

LISTING = """\
:env:.disable-pip-version-check='1'
:env:.find-links='/wheels /more'
global.extra-index-url='https://one.example/simple https://two.example/simple'
global.find-links='/overridden'
global.index-url='https://index.example/simple'
install.cert='/ca.pem'
"""


def test_pips_configuration_is_passed_on() -> None:
    sources = Sources.of_pip(LISTING)
    assert sources == Sources(
        index_url="https://index.example/simple",
        extra_index_urls=("https://one.example/simple", "https://two.example/simple"),
        find_links=("/wheels", "/more"),
        certificate="/ca.pem",
    )
    arguments = " ".join(sources.arguments())
    assert "--default-index https://index.example/simple --index https://one.example/simple" in arguments
    assert "--index-strategy unsafe-best-match --find-links /wheels --find-links /more" in arguments


def test_without_configuration_nothing_is_passed() -> None:
    assert Sources.of_pip("").arguments() == []


def test_torch_comes_from_a_directory_that_has_it_else_from_its_own_index(tmp_path: Path) -> None:
    sources = Sources(find_links=(str(tmp_path),))
    assert sources.torch_arguments() == ["--torch-backend", "cpu"]
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    assert sources.torch_arguments() == []


class Uv:
    """Stands for uv: makes what `uv venv` makes, and fails on demand when it installs."""

    def __init__(self, *, fails: bool = False) -> None:
        self.commands: list[list[str]] = []
        self._fails = fails

    def __call__(self, command: list[str], _environ: Mapping[str, str]) -> None:
        self.commands.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
        elif self._fails:
            raise LaunchError("no such package")


@pytest.fixture
def installer() -> Installer:
    return Installer(Sources, locks_directory(), Path("uv"))


def test_an_environment_is_current_once_it_is_made(tmp_path: Path, installer: Installer) -> None:
    home, uv = Home(tmp_path), Uv()
    assert not installer.is_current(home, WORKER_CPU)
    installer.make(home, WORKER_CPU, uv)
    assert installer.is_current(home, WORKER_CPU)
    assert not installer.is_current(home, RECIPES)
    assert str(locks_directory() / "worker-cpu.txt") in uv.commands[1]


def test_a_failed_installation_leaves_nothing_that_looks_finished(tmp_path: Path, installer: Installer) -> None:
    home = Home(tmp_path)
    with pytest.raises(LaunchError, match="no such package"):
        installer.make(home, WORKER_CPU, Uv(fails=True))
    assert list((tmp_path / "envs").iterdir()) == []


def test_another_lock_makes_an_environment_outdated(tmp_path: Path, installer: Installer) -> None:
    home = Home(tmp_path)
    installer.make(home, WORKER_CPU, Uv())
    (home.environment("worker-cpu") / STAMP).write_text("of an older lock")
    assert not installer.is_current(home, WORKER_CPU)


def test_the_locks_name_no_place_of_one_machine() -> None:
    for lock in locks_directory().glob("*.txt"):
        text = lock.read_text()
        assert "://" not in text, lock
        assert "find-links" not in text, lock
        assert " @ " not in text, lock
