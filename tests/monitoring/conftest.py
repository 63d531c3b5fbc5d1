"""A real Prometheus: from the machine, or from Debian's package, unpacked beside the other environments."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "prometheus"
DOWNLOAD_S = 120


@dataclass(frozen=True)
class Binaries:
    prometheus: Path
    promtool: Path


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Binaries:
    try:
        return find_binaries(tmp_path_factory.mktemp("deb"))
    except Unavailable as error:
        pytest.skip(str(error))


class Unavailable(Exception):
    """There is no Prometheus to be had here; the message says why."""


def find_binaries(directory: Path) -> Binaries:
    """The machine's, or Debian's, kept; downloads go to `directory`. Raises Unavailable."""
    found = [shutil.which(name) for name in ("prometheus", "promtool")]
    if all(found):
        return Binaries(*(Path(path) for path in found if path))
    home = Path(os.environ.get("SLUICE_HOME") or Path.home() / ".local/share/sluice")
    unpacked = home / "tools" / PACKAGE
    if not (unpacked / "usr/bin/promtool").exists():
        _unpack(directory, unpacked)
    return Binaries(unpacked / "usr/bin/prometheus", unpacked / "usr/bin/promtool")


def _unpack(directory: Path, target: Path) -> None:
    """Debian's package without installing it: its two programs need nothing but libc."""
    if shutil.which("apt-get") is None:
        raise Unavailable("neither Prometheus nor apt-get is here")
    try:
        _run("apt-get", "download", PACKAGE, directory=directory)
    except subprocess.CalledProcessError:
        try:
            _run("apt-get", "update", directory=directory)  # a fresh machine has no package lists; this needs root
            _run("apt-get", "download", PACKAGE, directory=directory)
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"Debian's package of Prometheus cannot be had: {error.stderr.decode()[-200:]}") from None
    (package,) = directory.glob("*.deb")
    staging = target.with_name(f"{target.name}.{os.getpid()}")
    _run("dpkg-deb", "-x", str(package), str(staging), directory=directory)
    try:
        staging.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(staging)


def _run(*command: str, directory: Path) -> None:
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=DOWNLOAD_S)
