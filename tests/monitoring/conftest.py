"""A real Prometheus: from the machine, or from Debian's package, unpacked beside the other environments."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
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
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Binaries]:
    found = [shutil.which(name) for name in ("prometheus", "promtool")]
    if all(found):
        yield Binaries(*(Path(path) for path in found if path))
        return
    home = Path(os.environ.get("SLUICE_HOME") or Path.home() / ".local/share/sluice")
    unpacked = home / "tools" / PACKAGE
    debian.fetch(PACKAGE, lambda: _unpack(tmp_path_factory.mktemp("deb"), unpacked))
    yield Binaries(unpacked / "usr/bin/prometheus", unpacked / "usr/bin/promtool")


def _unpack(directory: Path, target: Path) -> None:
    """Debian's package without installing it: its two programs need nothing but libc."""
    if (target / "usr/bin/promtool").exists():
        return
    debian.run("apt-get", "download", PACKAGE, directory=directory)
    (package,) = directory.glob("*.deb")
    staging = target.with_name(f"{target.name}.{os.getpid()}")
    debian.run("dpkg-deb", "-x", str(package), str(staging))
    try:
        staging.rename(target)
    except OSError:  # another process was faster, with a lock of another directory
        shutil.rmtree(staging)
