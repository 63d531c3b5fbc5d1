"""The state directory: what `sluice` keeps between two starts, and how it is written so that a crash leaves no ruin."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.errors import LaunchError

LOCK_WAIT_S = 1800.0
LOCK_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Home:
    """`envs/NAME`, `models/MODEL/VARIANT`, `logs/` and `run/` below one root."""

    root: Path

    @classmethod
    def at(cls, given: Path | None, environ: Mapping[str, str]) -> Home:
        """`given`, else `$SLUICE_HOME`, else `~/.local/share/sluice`."""
        chosen = given or Path(environ.get("SLUICE_HOME") or "~/.local/share/sluice")
        return cls(chosen.expanduser().absolute())

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def environment(self, name: str) -> Path:
        return self.root / "envs" / name

    def model(self, model: str) -> Path:
        return self.root / "models" / model

    def checkpoint(self, model: str, variant: str) -> Path:
        return self.model(model) / variant


@contextmanager
def locked(path: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Holds `path` as a lock among processes; waits up to `wait_s`. Raises LaunchError.

    The kernel gives the lock back when its holder dies, so a crash never blocks the next start.
    """
    make_directory(path.parent)
    with path.open("w") as file:
        _take(file.fileno(), path, wait_s)
        yield


def _take(descriptor: int, path: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() >= deadline:
                raise LaunchError(f"{path} is held by another sluice that works in the same directory") from None
        time.sleep(LOCK_POLL_S)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty directory that becomes `target` when the block ends well, and disappears when it does not.

    What an interrupted run left beside `target` is removed first; the caller holds the lock that makes this safe.
    """
    make_directory(target.parent)
    prefix = f".{target.name}.partial-"
    for ruin in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(ruin, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        stage.chmod(0o755)
        yield stage
        _replace(target, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(target: Path, stage: Path) -> None:
    """A directory cannot be renamed over another one that holds files: the old one steps aside first."""
    if target.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        target.rename(aside / "old")
        stage.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        stage.rename(target)


def make_directory(path: Path) -> Path:
    """`path`, made with its parents. Raises LaunchError where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise LaunchError(f"{path}: not writable")
    return path
