"""The results as Markdown: only what was measured, with the spread, the ratios and the circumstances."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from loadtest.bench import Cores, Findings, Plan
from loadtest.figures import TARGET_RATIOS, TARGET_VALUES, Figure
from loadtest.processes import ROOT
from loadtest.samples import Spread

Results = Mapping[str, Findings]

_METHOD = """\
One target at a time, one process (two for `sluice-2`; fresh for each repeat), in front of a fresh light worker;
{pinning}. Sluice asks for keys, admits through a Valkey (on the load's core) and has all metrics on.
Rounds over all targets: {plan.repeats}; windows of {plan.window_s:g} s after {plan.warmup_s:g} s of warm-up.
Cells are the median (lowest–highest) of the repeats; ratios are ratios of medians.

- **CPU per request**: CPU time of the target's whole process tree (POSIX CPU clocks, ns) ÷ answers, closed loop,
  32 keep-alive connections (8 for 1 MB prompts), answers of 64 tokens, not streamed.
- **CPU per streamed chunk**: the same ÷ content chunks, 64 streams of 256 tokens, each a chunk every 10 ms (6,400 a
  second), the requests' own cost included. *Staggered*: chunks fall due one by one. *In step*: all streams start and
  tick together, as one engine's batch does, counted over whole rounds from connecting to the last chunk. *Brief slow
  streams*: 64 tokens each, a chunk every 32 ms, staggered: a third of it are the streams' beginnings and ends. A load
  that worker and client could not carry is no figure; one that the target could not carry is a note.
- **Added TTFT**: open loop, Poisson arrivals, streams of 16 tokens; from the *scheduled* send time to the first content
  chunk, percentile through the target minus the same percentile of the same schedule sent straight to the worker.
- **Added inter-token delay**: open loop, 120 streams at 20 ms per token; from the time a chunk is *due* at the worker
  to its arrival, through the target minus direct. A target that cannot carry the rate shows seconds here.
- **Memory per idle stream**: growth of PSS of a fresh process with {plan.idle_count:,} streams that wait for
  their second token; socket buffers in the kernel are not in it.
"""


@dataclass(frozen=True)
class Circumstances:
    """Where and when the figures were obtained."""

    commit: str
    date: str
    python: str
    kernel: str
    processor: str
    load_average: float
    versions: Mapping[str, str]


def circumstances(versions: Mapping[str, str]) -> Circumstances:
    """Ask the machine; `versions` are the targets'."""
    return Circumstances(
        commit=_git("rev-parse", "--short", "HEAD") + (" + changes" if _git("status", "--porcelain", "app") else ""),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        python=platform.python_version(),
        kernel=platform.release(),
        processor=f"{_processor(Path('/proc/cpuinfo').read_text())}, {os.cpu_count()} cores",
        load_average=os.getloadavg()[0],
        versions=versions,
    )


def _git(*arguments: str) -> str:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def _processor(cpuinfo: str) -> str:
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def median(results: Results, target: str, figure: Figure) -> float | None:
    values = results[target].values.get(figure) if target in results else None
    return Spread.of(values).median if values else None


def cell(values: Sequence[float] | None, digits: int) -> str:
    """`median (lowest–highest)`, or a dash for what was not measured."""
    if not values:
        return "–"
    spread = Spread.of(values)
    shown = f"{spread.median:,.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ({spread.low:,.{digits}f}–{spread.high:,.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])


def figures_table(results: Results) -> str:
    rows = [
        [f"{f.label} [{f.unit}]", *(cell(found.values.get(f), f.digits) for found in results.values())] for f in Figure
    ]
    return table(["", *results], rows)


def ratio_table(results: Results, yardstick: str) -> str | None:
    """Each target's medians as a part of the yardstick's; None where the yardstick was not measured."""
    if yardstick not in results or len(results) < 2:
        return None
    rows = []
    for figure in (
        Figure.CPU_REQUEST_1K,
        Figure.CPU_REQUEST_32K,
        Figure.CPU_REQUEST_1M,
        Figure.CPU_CHUNK,
        Figure.CPU_CHUNK_IN_STEP,
        Figure.CPU_CHUNK_BRIEF,
    ):
        base = median(results, yardstick, figure)
        medians = [median(results, target, figure) for target in results]
        rows.append([figure.label, *(f"{m / base:.2f}" if base and m else "–" for m in medians)])
    return table([f"× {yardstick}", *results], rows)


def verdicts(results: Results) -> list[str]:
    """One line per target: met, missed, or not measured."""
    lines = []
    for (peer, figure), allowed in TARGET_RATIOS.items():
        ours, base = median(results, "sluice", figure), median(results, peer, figure)
        found = None if ours is None or base is None else ours / base
        lines.append(_verdict(f"{figure.label} at most {allowed:.2f} × {peer}", found, allowed))
    for figure, allowed in TARGET_VALUES.items():
        found = median(results, "sluice", figure)
        lines.append(_verdict(f"{figure.label} at most {allowed:g} {figure.unit}", found, allowed))
    return lines


def _verdict(what: str, found: float | None, allowed: float) -> str:
    if found is None:
        return f"{what}: not measured"
    return f"{what}: {found:.3f}, {'met' if found <= allowed else 'missed'}"


def with_section(document: str, section: str) -> str:
    """`document` with `section` in the place of its section of the same heading (the first line), or at the end."""
    heading = section.partition("\n")[0]
    parts = re.split(r"^(?=# )", document, flags=re.MULTILINE)
    kept = [section if part.partition("\n")[0] == heading else part for part in parts if part.strip()]
    if section not in kept:
        kept.append(section)
    return "\n".join(part.rstrip("\n") + "\n" for part in kept)


def render(results: Results, plan: Plan, cores: Cores, where: Circumstances) -> str:
    """The whole document."""
    ratios = [ratio_table(results, yardstick) for yardstick in ("naive", "vllm-router")]
    notes = [f"- {target}: {note}\n" for target, found in results.items() for note in found.notes]
    sections = [
        "# What the gateway costs\n",
        _where(where),
        figures_table(results),
        *(found for found in ratios if found),
        "".join(f"- {line}\n" for line in verdicts(results)),
        "## Notes\n\n" + "".join(notes) if notes else "",
        "## Versions\n\n" + "".join(f"- {target}: {version}\n" for target, version in where.versions.items()),
        "## Method\n\n" + _METHOD.format(plan=plan, pinning=_pinning(cores)),
    ]
    return "\n".join(section for section in sections if section)


def _where(where: Circumstances) -> str:
    machine = f"{where.processor}, Linux {where.kernel}, Python {where.python}"
    return f"Commit {where.commit}, {where.date}. {machine}; load average before the start {where.load_average:.2f}.\n"


def _pinning(cores: Cores) -> str:
    if cores.load == cores.target:
        return "nothing pinned, for want of a second core"
    return f"worker and client pinned to core {min(cores.load)}, target to core {min(cores.target)}"
