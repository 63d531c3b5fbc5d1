"""The scenarios' commands: `python -m loadtest overload`, and so on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
import uvloop

from app.errors import LaunchError
from loadtest.processes import ProcessError
from loadtest.report import circumstances, with_section
from loadtest.scenarios import churn, fairness, overload, real
from loadtest.scenarios.goals import Goal, goals_table
from loadtest.vllm_worker import versions

T = TypeVar("T")
REPLICAS = 3
RESULTS = Path(__file__).parents[1] / "RESULTS.md"
PICTURE = RESULTS.with_name("ttft-at-twice-the-capacity.svg")

quick_option = click.option("--quick", is_flag=True, help="Short and small: does it work? Writes no results by itself.")
output_option = click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help=f"Default: loadtest/{RESULTS.name}."
)


@click.command("overload")
@quick_option
@output_option
def overload_command(quick: bool, output: Path | None) -> None:
    """2, 5 and 10 times what the engines can serve: who is served, how soon the others know."""
    found = _run(overload.measure(overload.OverloadPlan.quick() if quick else overload.OverloadPlan()))
    _conclude("Overload", overload.goals(found), _overload_body(found), quick=quick, output=output)


@click.command("fairness")
@quick_option
@output_option
def fairness_command(quick: bool, output: Path | None) -> None:
    """One tenant asks for ten times its share; then all ten for twice theirs."""
    found = _run(fairness.measure(fairness.FairnessPlan.quick() if quick else fairness.FairnessPlan()))
    _conclude("Fairness", fairness.goals(found), _fairness_body(found), quick=quick, output=output)


@click.command("replicas")
@quick_option
@output_option
def replicas_command(quick: bool, output: Path | None) -> None:
    """Overload and fairness once more, through three gateways that share one Redis."""
    heavy = overload.OverloadPlan.quick() if quick else overload.OverloadPlan(multiples=(2,))
    shared = fairness.FairnessPlan.quick() if quick else fairness.FairnessPlan()
    crowd = _run(overload.measure(replace(heavy, fleet=replace(heavy.fleet, gateways=REPLICAS))))
    tenants = _run(fairness.measure(replace(shared, fleet=replace(shared.fleet, gateways=REPLICAS))))
    judged = [*overload.goals(crowd), *fairness.goals(tenants)]
    body = f"{_overload_body(crowd)}\n{_fairness_body(tenants)}"
    _conclude("Three replicas", judged, body, quick=quick, output=output)


@click.command("churn")
@quick_option
@output_option
@click.option("--requests", type=click.IntRange(1_000, 1_000_000), help="Default: 100,000; 2,000 with --quick.")
def churn_command(quick: bool, output: Path | None, requests: int | None) -> None:
    """A third of all clients leave, workers and a gateway are killed: what is left in the end?"""
    plan = churn.ChurnPlan(requests=requests or (2_000 if quick else 100_000))
    found = _run(churn.measure(plan))
    body = f"{churn.endings_table(found)}\n{churn.method(found)}"
    _conclude("Churn", churn.goals(found), body, quick=quick, output=output)


@click.command("vllm")
@output_option
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), default=PICTURE, show_default=False)
@click.option("--rate", type=click.FloatRange(0.5, 50), help="Requests/s; default: twice the capacity as measured.")
def vllm_command(output: Path | None, picture: Path, rate: float | None) -> None:
    """Twice the capacity of one real vLLM worker, through the gateway and straight to it (2.5 GiB, 8 minutes)."""
    found = _run(real.measure(real.RealPlan(rate=rate)))
    picture.write_text(real.picture(found))
    body = f"{real.roads_table(found)}\n{real.method(found, versions())}"
    _conclude("Overload of a real vLLM worker", [], body, quick=False, output=output)


@click.command("scenarios")
@quick_option
@output_option
@click.pass_context
def scenarios_command(context: click.Context, quick: bool, output: Path | None) -> None:
    """Overload, fairness, replicas and churn, one after another."""
    missed = []
    for command in (overload_command, fairness_command, replicas_command, churn_command):
        print(f"{command.name}:", flush=True)
        try:
            context.invoke(command, quick=quick, output=output)
        except SystemExit:
            missed.append(command.name)
    if missed:
        raise click.ClickException(f"targets missed in: {', '.join(map(str, missed))}")


def _overload_body(found: overload.Found) -> str:
    return f"{overload.bands_table(found)}\n{overload.cost_table(found)}\n{overload.method(found)}"


def _fairness_body(found: fairness.Found) -> str:
    return f"{fairness.tenants_table(found)}\n{fairness.method(found)}"


def _run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a scenario; SIGTERM ends it as Ctrl-C does, with every process stopped."""
    try:
        return uvloop.run(_cancelled_by_sigterm(work))
    except asyncio.CancelledError:
        raise click.Abort from None
    except (ProcessError, LaunchError, TimeoutError) as error:
        raise click.ClickException(str(error) or type(error).__name__) from None


async def _cancelled_by_sigterm(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


def _conclude(title: str, judged: Sequence[Goal], body: str, *, quick: bool, output: Path | None) -> None:
    """Print the goals, write the section; exit with 1 for a goal that is missed, in a quick run only for a hard one."""
    text = f"{goals_table(judged)}\n{body}" if judged else body
    print("\n" + text)
    where = circumstances({})
    section = (
        f"# {title}\n\nCommit {where.commit}, {where.date}. {where.processor}, Linux {where.kernel}, Python "
        f"{where.python}; load average at the end {os.getloadavg()[0]:.2f}.\n\n{text}"
    )
    written = output or (None if quick else RESULTS)
    if written:
        written.write_text(with_section(written.read_text() if written.exists() else "", section))
        print(f"written to {written}")
    if any(not goal.is_met for goal in judged if goal.is_hard or not quick):
        raise SystemExit(1)


COMMANDS = (overload_command, fairness_command, replicas_command, churn_command, vllm_command, scenarios_command)
