"""Which Redis or Valkey carries the fixes that a server which runs scripts needs. Pure.

CVE-2025-49844: a script may run code of its own (both). CVE-2025-67733: a script's error may forge replies (Valkey).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# The first release of each line that has the fixes; lines after the last have them all.
REDIS = {(6, 2): 20, (7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2}
VALKEY = {(7, 2): 12, (8, 0): 7, (8, 1): 6, (9, 0): 3}

_NUMBERS = re.compile(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})")


def doubt_about(facts: Mapping[str, str]) -> str | None:
    """What an operator should know about the server that says this in its INFO, in one line; None for nothing."""
    name, told, fixed = "Redis", facts.get("redis_version", ""), REDIS
    if "valkey_version" in facts:
        name, told, fixed = "Valkey", facts["valkey_version"], VALKEY
    found = _NUMBERS.match(told)
    if found is None:
        return None
    line, patch = (int(found[1]), int(found[2])), int(found[3])
    if line > max(fixed) or patch >= fixed.get(line, patch + 1):
        return None
    return f"{name} {found[0]} lacks fixes of its script engine, unless its package has them backported"
