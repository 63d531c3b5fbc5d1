"""Whether this machine is large enough for a chain of recipes, decided from the base's headers before it is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from app.errors import LaunchError
from app.recipes.recipe import Chain
from app.recipes.safetensors import CheckpointFacts

GIB = 1024**3
# torch, transformers and llm-compressor with nothing loaded, and the calibration text's activations.
LIBRARIES_BYTES = 1_200_000_000
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USE = Path("/sys/fs/cgroup/memory.current")


def require_room(chain: Chain, base: CheckpointFacts, output: Path) -> None:
    """Raises LaunchError where memory or disk is too small for `chain`, with what is needed and what is there."""
    plain = 2 * base.parameters_count
    _require("memory", int(chain.memory * plain) + LIBRARIES_BYTES, memory_available(), chain)
    _require(f"disk in {output.parent}", int(chain.size * plain), shutil.disk_usage(output).free, chain)


def _require(what: str, need: int, available: int, chain: Chain) -> None:
    if available < need:
        raise LaunchError(
            f"not enough {what}: recipe {chain.name!r} needs about {need / GIB:.1f} GiB for this model, "
            f"{available / GIB:.1f} GiB is available"
        )


def memory_available() -> int:
    """Bytes that can still be taken: the machine's, or what is left of the container's limit."""
    available = int(psutil.virtual_memory().available)
    try:
        return min(available, int(CGROUP_LIMIT.read_text()) - int(CGROUP_USE.read_text()))
    except (OSError, ValueError):  # no such file, or the word "max"
        return available
