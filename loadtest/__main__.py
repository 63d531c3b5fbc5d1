"""`python -m loadtest`: what the gateway costs, and what its routing gains."""

import asyncio
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click
import httpx
import uvloop

from app.errors import ConfigurationError
from loadtest.adaptive import AdaptivePlan
from loadtest.adaptive import figures as adaptive_figures
from loadtest.adaptive import measure as measure_adaptive
from loadtest.adaptive import section as adaptive_section
from loadtest.batch_truth import TruthPlan
from loadtest.batch_truth import figures as truth_figures
from loadtest.batch_truth import measure as measure_truth
from loadtest.batch_yields import YieldPlan
from loadtest.batch_yields import figures as yield_figures
from loadtest.batch_yields import measure as measure_yield
from loadtest.bench import Cores, Findings, Plan, bench
from loadtest.cascade import CascadePlan
from loadtest.cascade import figures as cascade_figures
from loadtest.cascade import measure as measure_cascade
from loadtest.cascade import section as cascade_section
from loadtest.conversations import Workload
from loadtest.cpu import split_cores, usable_cores
from loadtest.elastic import ElasticPlan, forms_of
from loadtest.elastic import figures as elastic_figures
from loadtest.elastic import measure as measure_elastic
from loadtest.elastic import section as elastic_section
from loadtest.order import MIXES, OrderPlan
from loadtest.order import figures as order_figures
from loadtest.order import measure as measure_order
from loadtest.order import section as order_section
from loadtest.parsing import parsing_table
from loadtest.peers import PEERS, bench_home, install
from loadtest.prefix import PrefixPlan
from loadtest.prefix import figures as prefix_figures
from loadtest.prefix import measure as measure_prefix
from loadtest.prefix import section as prefix_section
from loadtest.processes import ProcessError
from loadtest.report import circumstances, figures_table, render, verdicts, with_section
from loadtest.scenarios.command import COMMANDS
from loadtest.swarm.command import COMMANDS as SWARM_COMMANDS
from loadtest.targets import Target, targets
from loadtest.vllm_worker import versions

T = TypeVar("T")

RESULTS = Path(__file__).with_name("RESULTS.md")
BUSY = 0.5
"""Load average per core from which latencies say more about the machine's other work than about the target."""
QUICK = Plan(repeats=1, window_s=1.5, warmup_s=0.5, idle_count=200)


@click.group()
def main() -> None:
    """Measure what stands between clients and vLLM workers. Load goes to loopback only."""


@main.command("bench")
@click.option("--targets", "names", help="Comma-separated; default: all that are installed.")
@click.option("--repeats", type=click.IntRange(1, 20), default=3, show_default=True, help="Rounds over the targets.")
@click.option("--seconds", type=click.FloatRange(0.5, 60), default=6.0, show_default=True, help="Measured window.")
@click.option("--idle-streams", type=click.IntRange(10, 9_000), default=8_000, show_default=True)
@click.option("--quick", is_flag=True, help="One short round: does it work? Writes no results by itself.")
@click.option("--install-peers", is_flag=True, help="First install vllm-router and Envoy under $SLUICE_HOME/bench.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help=f"Default: loadtest/{RESULTS.name}.")
def bench_command(
    names: str | None,
    repeats: int,
    seconds: float,
    idle_streams: int,
    quick: bool,
    install_peers: bool,
    output: Path | None,
) -> None:
    """CPU per request and per chunk, added latency and memory, one target at a time."""
    if install_peers:
        _install_peers()
    chosen = _chosen(names)
    plan = QUICK if quick else Plan(repeats, seconds, idle_count=idle_streams)
    _allow_files(2 * plan.idle_count + 1_000)
    cores = Cores(*split_cores(usable_cores()))
    where = circumstances({target.name: target.version() for target in chosen})
    if where.load_average > BUSY * len(usable_cores()):
        print(f"the machine is busy (load average {where.load_average:.2f}): do not trust the latencies")
    try:
        results = uvloop.run(_measure(chosen, plan, cores))
    except asyncio.CancelledError:
        raise click.Abort from None  # SIGTERM; Ctrl-C reaches click by itself
    print("\n" + figures_table(results) + "\n" + "\n".join(verdicts(results)))
    written = output or (None if quick else RESULTS)
    if written:
        _write(written, render(results, plan, cores, where))
    if any(not found.values for found in results.values()):
        raise SystemExit(1)


@main.command("parse")
def parse_command() -> None:
    """CPU of reading a request body: milliseconds per megabyte, by what is in it."""
    print(parsing_table())


@main.command("prefix")
@click.option("--rounds", type=click.IntRange(1, 10), default=3, show_default=True, help="Rounds over the policies.")
@click.option("--conversations", type=click.IntRange(2, 40), default=8, show_default=True)
@click.option("--kv-mib", type=click.IntRange(64, 4096), default=128, show_default=True, help="Each worker's KV cache.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help=f"Default: loadtest/{RESULTS.name}.")
def prefix_command(rounds: int, conversations: int, kv_mib: int, output: Path | None) -> None:
    """Prefix-cache hits and TTFT by routing policy, on two real vLLM workers (5 GiB of memory, two cores)."""
    plan = PrefixPlan(Workload(conversations=conversations), rounds, kv_mib=kv_mib)
    try:
        seen = uvloop.run(_cancelled_by_sigterm(measure_prefix(plan)))
    except asyncio.CancelledError:
        raise click.Abort from None
    except ProcessError as error:
        raise click.ClickException(str(error)) from None
    print("\n" + prefix_figures(seen))
    _write(output or RESULTS, prefix_section(seen, plan, versions()))


@main.command("adaptive")
@click.option("--rounds", type=click.IntRange(1, 10), default=AdaptivePlan.rounds, show_default=True)
@click.option("--seconds", type=click.FloatRange(3, 120), default=AdaptivePlan.window_s, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help=f"Default: loadtest/{RESULTS.name}.")
def adaptive_command(rounds: int, seconds: float, output: Path | None) -> None:
    """`max_concurrency: auto` against static limits, on one real vLLM worker (9 minutes)."""
    plan = AdaptivePlan(rounds=rounds, window_s=seconds)
    try:
        found = uvloop.run(_cancelled_by_sigterm(measure_adaptive(plan)))
    except asyncio.CancelledError:
        raise click.Abort from None
    except ProcessError as error:
        raise click.ClickException(str(error)) from None
    print("\n" + adaptive_figures(found))
    _write(output or RESULTS, adaptive_section(found, plan, versions()))


for command in (*COMMANDS, *SWARM_COMMANDS):
    main.add_command(command)


@main.command("order")
@click.option("--requests", type=click.IntRange(100, 100_000), default=4000, show_default=True, help="In each run.")
@click.option("--seeds", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help=f"Default: loadtest/{RESULTS.name}.")
def order_command(requests: int, seeds: int, output: Path | None) -> None:
    """First come first served against shortest predicted first, on simulated workers (a minute, no load at all)."""
    plan = OrderPlan(requests=requests)
    results = measure_order(plan, tuple(MIXES), seeds=seeds)
    print("\n" + order_figures(results))
    _write(output or RESULTS, order_section(results, plan, seeds))


@main.command("cascade")
@click.option("--small", default=CascadePlan.small, show_default=True, help="The variant that answers first.")
@click.option("--large", default=CascadePlan.large, show_default=True)
@click.option(
    "--questions", type=click.IntRange(4, 500), default=CascadePlan.count, show_default=True, help="Per task."
)
@click.option("--share", type=click.FloatRange(0, 1), default=CascadePlan.share, help="Escalated by the gateway's own.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help=f"Default: loadtest/{RESULTS.name}.")
def cascade_command(small: str, large: str, questions: int, share: float, output: Path | None) -> None:
    """Share escalated, quality and cost of a cascade, on two real vLLM workers (5 GiB, two cores, some 10 minutes)."""
    plan = CascadePlan(small=small, large=large, count=questions, share=share)
    try:
        found = uvloop.run(_cancelled_by_sigterm(measure_cascade(plan)))
    except asyncio.CancelledError:
        raise click.Abort from None
    except (ProcessError, httpx.HTTPError) as error:
        raise click.ClickException(str(error)) from None
    print("\n" + cascade_figures(found))
    _write(output or RESULTS, cascade_section(found, plan, versions()))


@main.command("elastic")
@click.option("--requests", type=click.IntRange(100, 100_000), default=ElasticPlan.requests, show_default=True)
@click.option("--load", type=click.FloatRange(0.1, 20), default=ElasticPlan.load, show_default=True, help="× capacity.")
@click.option(
    "--target", type=click.FloatRange(0.01, 60), default=ElasticPlan.target_s, show_default=True, help="TTFT, s."
)
@click.option(
    "--workers", type=click.IntRange(1, 64), default=ElasticPlan.workers, show_default=True, help="A variant."
)
@click.option(
    "--manifest",
    "manifests",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A sluice.json with a card, the best variant's first; default: figures of a first measurement.",
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=ElasticPlan.prompt_of_card, help="Of the cards' TTFT.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help=f"Default: loadtest/{RESULTS.name}.")
def elastic_command(
    requests: int,
    load: float,
    target: float,
    workers: int,
    manifests: tuple[Path, ...],
    prompt_tokens: int,
    output: Path | None,
) -> None:
    """With and without steps down to lesser variants under overload, on simulated workers (seconds, no load at all)."""
    plan = ElasticPlan(requests=requests, load=load, target_s=target, workers=workers, prompt_of_card=prompt_tokens)
    source = "SmolLM2-135M was on vLLM's CPU build, one core a worker;\nquality by perplexity"
    if manifests:
        try:
            plan = replace(plan, forms=forms_of(manifests, prompt_tokens))
        except (ValueError, ConfigurationError) as error:
            raise click.ClickException(str(error)) from None
        source = "the variants' cards say"
    per_s, found = measure_elastic(plan)
    print("\n" + elastic_figures(found, plan))
    _write(output or RESULTS, elastic_section(found, plan, per_s, source))


@main.command("batch-truth")
@click.option("--lines", type=click.IntRange(1, 200_000), default=TruthPlan.lines, show_default=True)
@click.option("--seed", type=int, default=TruthPlan.seed, show_default=True, help="What is hit, when, and how.")
@click.option("--every", nargs=2, type=float, default=(5.0, 10.0), show_default=True, help="Seconds between hits.")
def batch_truth_command(lines: int, seed: int, every: tuple[float, float]) -> None:
    """A batch while workers, gateways and Valkey are killed and paused: one record for each line, or exit code 1."""
    plan = TruthPlan(lines=lines, seed=seed, every_s=every)
    with tempfile.TemporaryDirectory(prefix="sluice-batch-truth-") as place:
        try:
            truth = asyncio.run(_cancelled_by_sigterm(measure_truth(plan, Path(place))))
        except asyncio.CancelledError:
            raise click.Abort from None
    print(truth_figures(truth, plan))
    if faults := truth.faults(plan):
        raise click.ClickException("; ".join(faults))


@main.command("batch-yields")
@click.option("--pairs", type=click.IntRange(1, 20), default=YieldPlan.pairs, show_default=True)
@click.option("--seconds", type=click.FloatRange(3, 300), default=YieldPlan.window_s, show_default=True)
@click.option("--rate", type=click.FloatRange(1, 500), default=YieldPlan.rate, show_default=True, help="Interactive.")
@click.option("--slots", type=click.IntRange(1, 1024), default=YieldPlan.slots, show_default=True)
@click.option("--line-tokens", type=click.IntRange(1, 4096), default=YieldPlan.line_tokens, show_default=True)
@click.option("--modelled", is_flag=True, help="A worker that slows down with its load.")
def batch_yields_command(pairs: int, seconds: float, rate: float, slots: int, line_tokens: int, modelled: bool) -> None:
    """Interactive TTFT without and with a batch that takes all it can get, and what that is."""
    plan = YieldPlan(pairs, seconds, rate, slots, line_tokens=line_tokens, is_modelled=modelled)
    with tempfile.TemporaryDirectory(prefix="sluice-batch-yields-") as place:
        try:
            found = asyncio.run(_cancelled_by_sigterm(measure_yield(plan, Path(place))))
        except asyncio.CancelledError:
            raise click.Abort from None
    print(yield_figures(found))


def _write(file: Path, section: str) -> None:
    """Put a section of the results into its place; the file's other sections stay."""
    file.write_text(with_section(file.read_text() if file.exists() else "", section))
    print(f"written to {file}")


def _install_peers() -> None:
    for peer in PEERS:
        print(f"{peer.distribution} {peer.version}: ", end="", flush=True)
        try:
            print("installed" if install(peer, bench_home()) else "is there")
        except (OSError, subprocess.SubprocessError) as error:
            print(f"not installed: {error}")


def _chosen(names: str | None) -> list[Target]:
    """The targets to measure; a missing one is skipped with a line.

    Raises:
        click.UsageError: an unknown name, or nothing left to measure.
    """
    known = targets(bench_home())
    asked = names.split(",") if names else list(known)
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise click.UsageError(f"unknown target {unknown[0]!r}; known: {', '.join(known)}")
    for name in asked:
        if why := known[name].missing():
            print(f"skipping {name}: {why}")
    chosen = [known[name] for name in asked if not known[name].missing()]
    if not chosen:
        raise click.UsageError("none of the targets is there to measure")
    return chosen


def _allow_files(count: int) -> None:
    """Let this process and those it starts hold `count` open files; a relay has two for each stream."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise click.UsageError(f"{count} open files needed, the system allows {hard}: lower --idle-streams")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _measure(chosen: list[Target], plan: Plan, cores: Cores) -> dict[str, Findings]:
    """Run the bench on the load's cores."""
    os.sched_setaffinity(0, cores.load)
    return await _cancelled_by_sigterm(bench(chosen, plan, cores))


async def _cancelled_by_sigterm(work: Awaitable[T]) -> T:
    """SIGTERM ends it as Ctrl-C does, with every process stopped."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await work


if __name__ == "__main__":
    main()
