"""The table "bad inputs tried, expected, got" of SECURITY.md, made of the tests' own cases.

`python -m tests.hostile.table` writes it. What was got is what was expected: a test fails otherwise, and another when
the table is not the one these cases make.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from tests.hostile.bodies import BODIES
from tests.hostile.case import Case
from tests.hostile.framing import FRAMING
from tests.hostile.meanings import MEANINGS

SECURITY = Path(__file__).parent.parent.parent / "SECURITY.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
SHOWN_CHARS = 90


def table() -> str:
    cases = sorted([*FRAMING, *BODIES, *MEANINGS], key=lambda case: int(case.row[1:]))
    lines = ["| Row | Tried | Expected, and got |", "|---|---|---|"]
    for (row, expected), same in groupby(cases, key=lambda case: (case.row, case.expected)):
        lines.append(f"| {row} | {' · '.join(_shown(case) for case in same)} | {_short(expected)} |")
    return "\n".join(lines) + "\n"


def _shown(case: Case) -> str:
    what = case.what if len(case.what) <= SHOWN_CHARS else case.what[:SHOWN_CHARS] + "…"
    visible = "".join(char if char.isprintable() else repr(char)[1:-1] for char in what)
    return "`" + visible.replace("|", "\\|").replace("`", "'") + "`"


def _short(expected: str) -> str:
    statuses, _, code = expected.partition(" `")
    parts = statuses.split(" then ")
    runs = [(status, len(list(same))) for status, same in groupby(parts)]
    return " then ".join(f"{count} × {status}" if count > 1 else status for status, count in runs) + (
        f" `{code}" if code else ""
    )


def main() -> None:
    text = SECURITY.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    SECURITY.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
