"""A real Prometheus: from the machine, or from Debian's package, unpacked beside the other environments."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import debian

PACKAGE = "prometheus"


@dataclass(frozen=True)
class Binaries:
    prometheus: Path
    promtool: Path


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Binaries:
    try:
        return find_binaries(tmp_path_factory.mktemp("deb"))
    except debian.Unavailable as error:
        pytest.skip(str(error))


def find_binaries(directory: Path) -> Binaries:
    """The machine's, or Debian's, kept; downloads go to `directory`. Raises debian.Unavailable."""
    found = [shutil.which(name) for name in ("prometheus", "promtool")]
    if all(found):
        return Binaries(*(Path(path) for path in found if path))
    home = Path(os.environ.get("SLUICE_HOME") or Path.home() / ".local/share/sluice")
    unpacked = home / "tools" / PACKAGE
    if not (unpacked / "usr/bin/promtool").exists():
        debian.fetch(PACKAGE, lambda: _unpack(directory, unpacked))
    return Binaries(unpacked / "usr/bin/prometheus", unpacked / "usr/bin/promtool")


def _unpack(directory: Path, target: Path) -> None:
    """Debian's package without installing it: its two programs need nothing but libc."""
    if (target / "usr/bin/promtool").exists():  # another process was faster
        return
    debian.run("apt-get", "download", PACKAGE, directory=directory)
    (package,) = directory.glob("*.deb")
    staging = target.with_name(f"{target.name}.{os.getpid()}")
    debian.run("dpkg-deb", "-x", str(package), str(staging))
    try:
        staging.rename(target)
    except OSError:  # and so was one that takes its turns elsewhere
        shutil.rmtree(staging)
