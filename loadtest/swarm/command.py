"""The commands around locust: a run's report, and traces."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click

from loadtest.swarm import trace
from loadtest.swarm.answer import Record
from loadtest.swarm.figures import SLOS, goals
from loadtest.swarm.page import page, summary
from loadtest.swarm.run import read_records

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)


@click.command("locust-report")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--title", default="A run of locust", show_default=True)
@click.option("--output", type=OUTPUT, help="Default: DIRECTORY/report.html.")
def report_command(directory: Path, title: str, output: Path | None, **slos: float) -> None:
    """One page on the run in DIRECTORY; exit code 1 if a goal is missed."""
    promised = {name: slos[f"slo_{name}"] for name in SLOS if slos[f"slo_{name}"] is not None}
    records = _records(directory)
    judged = goals(records, promised)
    interactive = [record for record in records if record.band != "batch"]
    began = datetime.fromtimestamp(records[0].at_s, UTC)
    written = output or directory / "report.html"
    written.write_text(page(f"{title}, {began:%Y-%m-%d %H:%M} UTC", records, judged), encoding="utf-8")
    print(f"{summary(interactive)}\nwritten to {written}")
    for goal in judged:
        print(" ".join(goal.row()))
    if not all(goal.is_met for goal in judged):
        raise SystemExit(1)


for _name, _what in SLOS.items():
    click.option(f"--slo-{_name.replace('_', '-')}", type=float, help=f"Goal for {_what}.")(report_command)


def _records(directory: Path) -> list[Record]:
    """Raises click.UsageError where there is nothing to report."""
    try:
        records = read_records(directory)
    except ValueError as error:
        raise click.UsageError(f"{directory}: {error}") from None
    if not records:
        raise click.UsageError(f"no records in {directory}: was it locust's --run-dir?")
    return records


def _lines(source: Path) -> Iterator[str]:
    with source.open(encoding="utf-8", newline="") as lines:
        yield from lines


@click.command("trace")
@click.argument("source", type=FILE, required=False)
@click.option("--output", type=OUTPUT, required=True, help="JSON lines for the locustfile's `--trace`.")
@click.option("--begin-s", type=click.FloatRange(0), default=0.0, help="Of the trace's own time.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Of the trace's own time; default: all of it.")
@click.option("--speed", type=click.FloatRange(0, min_open=True), default=1.0, help="2: twice as fast.")
@click.option("--most", type=click.IntRange(1, 10_000_000), help="Requests.")
@click.option("--prompt-limit", type=click.IntRange(1), help="Longest prompt in tokens; longer ones are cut.")
@click.option("--answer-limit", type=click.IntRange(1), help="Longest answer in tokens.")
@click.option("--rate", type=click.FloatRange(0.01, 1000), default=2.0, help="Of a made-up trace: requests/s.")
@click.option("--seed", type=int, default=1, help="Of a made-up trace.")
def trace_command(
    source: Path | None,
    output: Path,
    begin_s: float,
    seconds: float | None,
    speed: float,
    most: int | None,
    prompt_limit: int | None,
    answer_limit: int | None,
    rate: float,
    seed: int,
) -> None:
    """Convert SOURCE (BurstGPT, Azure LLM inference, Mooncake); without it, make up a trace of `--seconds`."""
    try:
        found = trace.convert(_lines(source)) if source else trace.synthetic(seconds or 60.0, rate, seed)
        chosen = trace.window(
            found,
            begin_s=begin_s,
            lasts_s=seconds,
            speed=speed,
            most=most,
            prompt_limit=prompt_limit,
            answer_limit=answer_limit,
        )
    except trace.TraceError as error:
        raise click.UsageError(f"{source}: {error}") from None
    if not chosen:
        raise click.UsageError("no request is left in this part of the trace")
    output.write_text("".join(trace.encode(chosen)), encoding="utf-8")
    tokens = sum(arrival.prompt_tokens for arrival in chosen), sum(arrival.answer_tokens for arrival in chosen)
    print(f"{len(chosen):,} requests in {chosen[-1].at_s:,.1f} s, {tokens[0]:,} + {tokens[1]:,} tokens: {output}")


COMMANDS = (report_command, trace_command)
