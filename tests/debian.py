"""Debian's packages for tests that need more than pip brings."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.processes import one_at_a_time

FETCH_S = 240
"""Of one command; a slow network is a reason to skip, and must not look like a test that hangs."""


class Unavailable(Exception):
    """A package cannot be had here; the message says why."""


def fetch(package: str, how: Callable[[], None]) -> None:
    """Run `how`, which fetches `package`: a second time after an update, for a fresh machine has no package lists.

    Raises Unavailable.
    """
    if shutil.which("apt-get") is None:
        raise Unavailable(f"neither {package} nor apt-get is here")
    with one_at_a_time("apt-get"):  # which gives up by itself where another has its lists locked
        try:
            how()
        except subprocess.SubprocessError:
            try:
                run("apt-get", "update")
                how()
            except subprocess.SubprocessError as error:
                raise Unavailable(f"Debian's package of {package} cannot be had: {_reason(error)}") from None


def run(*command: str, directory: Path | None = None) -> None:
    """Raises subprocess.SubprocessError."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=FETCH_S, env=environment)


def _reason(error: subprocess.SubprocessError) -> str:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else None
    return said.decode(errors="replace")[-200:] if said else str(error)
