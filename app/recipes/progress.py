"""How a recipe tells its caller how far it is: one JSON object per line on standard output.

{"doing": "quantizing", "completed": 3, "total": 210}
{"error": "…one line…"}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TextIO

Report = Callable[[str, float, float | None], None]


def reporter(stream: TextIO) -> Report:
    """A report of (what is being done, how much of it, of how much) that writes to `stream`."""

    def report(doing: str, completed: float, total: float | None) -> None:
        print(json.dumps({"doing": doing, "completed": completed, "total": total}), file=stream, flush=True)

    return report
