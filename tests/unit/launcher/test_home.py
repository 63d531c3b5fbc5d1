"""The state directory survives crashes: a directory is there whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import LaunchError
from app.launcher.home import Home, locked, make_directory, staged


def test_where_the_home_is(tmp_path: Path) -> None:
    assert Home.at(tmp_path, {"SLUICE_HOME": "/elsewhere"}).root == tmp_path
    assert Home.at(None, {"SLUICE_HOME": str(tmp_path)}).root == tmp_path
    assert Home.at(None, {}).root == Path("~/.local/share/sluice").expanduser()


def test_a_staged_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "models" / "m"
    with staged(target) as stage:
        (stage / "weights").write_text("w")
        assert not target.exists()
    assert (target / "weights").read_text() == "w"
    assert list(target.parent.iterdir()) == [target]


def _interrupted(target: Path) -> None:
    with staged(target) as stage:
        (stage / "half").write_text("h")
        raise KeyboardInterrupt


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with pytest.raises(KeyboardInterrupt):
        _interrupted(target)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_former_directory_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), staged(target):
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]


def test_a_new_directory_takes_the_place_of_the_former_one(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    (target / "old").touch()
    with staged(target) as stage:
        (stage / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".m.partial-abc" / "deep").mkdir(parents=True)
    (tmp_path / ".other.partial-abc").mkdir()
    with staged(tmp_path / "m"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-abc", "m"]


def test_a_lock_is_held_once_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, wait_s=0):
        with pytest.raises(LaunchError, match="another sluice"), locked(path, wait_s=0):
            pass
    with locked(path, wait_s=0):
        pass


def test_a_directory_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match="file"):
        make_directory(tmp_path / "file" / "below")
