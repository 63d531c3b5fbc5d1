"""What this machine's memory and arithmetic can do at most, as torch reaches it: the denominators of S-MBU and S-MFU.

`python -m app.recipes.peaks --output FILE` writes {"bytes_per_s": …, "flops": …}, both for all cores together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

COPIED_FLOATS = 64 * 1024 * 1024  # 256 MiB, beyond every cache
MATRIX = 1536
ROUNDS = 5


def peak_bytes_per_s() -> float:
    """Of a copy, which reads and writes: both count."""
    source, target = torch.ones(COPIED_FLOATS), torch.empty(COPIED_FLOATS)
    return float(2 * source.nbytes) / _quickest(lambda: target.copy_(source))


def peak_flops() -> float:
    """Of a float32 matrix product, a multiplication and an addition for each pair."""
    left, right = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX)
    return float(2 * MATRIX**3) / _quickest(lambda: left @ right)


def _quickest(work: Callable[[], object]) -> float:
    """Seconds of the quickest of ROUNDS: whatever else runs can only slow it down."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.recipes.peaks")
    parser.add_argument("--output", required=True, type=Path)
    output: Path = parser.parse_args(arguments).output
    output.write_text(json.dumps({"bytes_per_s": peak_bytes_per_s(), "flops": peak_flops()}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
