"""The command line. Everything heavy is imported inside the command that needs it, so that `--help` is quick."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from app.errors import ConfigurationError, SluiceError

if TYPE_CHECKING:
    from app.launcher.home import Home
    from app.launcher.serving import ReadyKeys
    from app.settings import QualityGate, Settings
    from app.tenancy.keys import Issued
    from app.tenancy.registrar import Registrar

FAILED = 1
WRONG_USAGE = 2

DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Command = TypeVar("Command", bound=Callable[..., Any])
T = TypeVar("T")

UP_EXAMPLES = """
\b
Examples:
  sluice up                                    the default model, quantized to INT8
  sluice up --variants dense,w8a8              two workers: unquantized and INT8
  sluice up --model Qwen/Qwen2.5-0.5B-Instruct any model of the Hugging Face hub
  sluice up --model ./checkpoint --name mine   a local checkpoint, quantized already or not
  sluice up --worker http://gpu-1:8000=qwen:fp8 --worker http://gpu-2:8000=qwen:fp8
                                               only the gateway, in front of workers that run
"""
KEYS_EXAMPLES = """
\b
Examples:
  sluice keys create --tenant acme --expires 90d --config sluice.yaml     in the configuration's Redis
  sluice keys create --admin --file keys.yaml                             in a file, digests only
  sluice keys rotate key_0123456789abcdef --overlap 7d --config sluice.yaml
"""
WORKER_EXAMPLES = """
\b
Examples:
  sluice worker ~/models/smollm2/w8a8 --served-model smollm2:w8a8 --port 9001
  sluice worker ORG/MODEL --served-model qwen:dense --port 9001 --engine cuda -- --max-num-batched-tokens 4096
"""
BATCH_EXAMPLES = """
\b
Examples:
  sluice batch run requests.jsonl --output results.jsonl
  sluice batch run requests.jsonl --output results.jsonl --model smollm2:w8a8 --base-url http://gateway:8000/v1
"""
COMPRESS_EXAMPLES = """
\b
Examples:
  sluice compress --list
  sluice compress smollm2 --recipe w8a8 --output ./smollm2-w8a8
  sluice compress smollm2 --recipe depth+heal+w8a8 --parameter drop=6 --output ./smollm2-small
  sluice compress ORG/MODEL --recipe w4a16 --calibration ./texts.jsonl --output ./model-w4a16
"""


EVALUATE_EXAMPLES = """
\b
Examples:
  sluice evaluate smollm2 --output ./cards                 all its variants; the page is ./cards/variants.md
  sluice evaluate smollm2 --variants w8a8 --only speed     measure speed anew, keep the quality
  sluice evaluate ./made --report --output ./cards         only the page, from cards that are there
"""


class OneLineErrors(click.Group):
    """Ends every command with its exit code: what goes wrong on purpose is one line, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigurationError as error:
            self._end(str(error), WRONG_USAGE)
        except SluiceError as error:
            self._end(str(error), FAILED, getattr(error, "log_lines", []), getattr(error, "log", None))
        except KeyboardInterrupt:
            self._end("interrupted", FAILED)
        return None

    def _end(self, message: str, status: int, log_lines: list[str] | None = None, log: Path | None = None) -> None:
        click.echo(f"error: {message}", err=True)
        for line in log_lines or []:
            click.echo(f"  | {line}", err=True)
        if log:
            click.echo(f"  all of it: {log}", err=True)
        raise SystemExit(status)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sluice")
def main() -> None:
    """OpenAI-compatible serving of compressed models: one fair queue in front of vLLM workers."""


def home_option(command: Command) -> Command:
    return click.option(
        "--home",
        type=click.Path(path_type=Path),
        help="Where environments, models and logs are kept.  [default: $SLUICE_HOME or ~/.local/share/sluice]",
    )(command)


def engine_options(command: Command) -> Command:
    """What both `up` and `worker` pass on to vLLM."""
    options = [
        click.option("--engine", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
                     help="Build of vLLM; auto takes the GPU where there is one with a vLLM installed."),
        click.option("--max-model-len", type=click.IntRange(min=1),
                     help="Longest prompt plus answer, in tokens.  [default: 2048, or what the model can]"),
        click.option("--kv-cache-bytes", type=click.IntRange(min=1), default=None,
                     help="Memory of one worker's KV cache.  [default: 128 MiB on a CPU, what is left on a GPU]"),
        click.option("--max-num-seqs", type=click.IntRange(min=1), default=8, show_default=True,
                     help="Requests that one worker runs at once: its slots."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@main.command(epilog=UP_EXAMPLES)
@click.option("--model", metavar="ID_OR_PATH", help="Hub id, checkpoint directory or .gguf file.  [default: smollm2]")
@click.option("--name", help="What clients ask for.  [default: made from --model]")
@click.option("--variants", metavar="A,B", default="", help="One worker for each.  [default: w8a8]")
@click.option("--worker", "workers", metavar="URL[=MODEL:VARIANT]", multiple=True,
              help="A worker that runs already; no engine is started then. Repeatable.")  # fmt: skip
@click.option("--config", type=click.Path(path_type=Path), help="More configuration for the gateway (YAML).")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on, 0 for any free one.  [default: 8000]")
@click.option("--processes", type=click.IntRange(min=1), help="Gateway processes.  [default: 1]")
@engine_options
@home_option
@click.option("--run", type=click.Path(path_type=Path), help="Where this start keeps gateway.yaml and its logs.")
@click.option("--prepare-only", is_flag=True, help="Install and make what is missing, then end.")
def up(home: Path | None, variants: str, workers: tuple[str, ...], engine: str, **given: Any) -> None:
    """Serve a model: installs what is missing, then starts Valkey, vLLM and the gateway, and stops them on Ctrl-C."""
    with require_extra("up"):
        from rich.console import Console

        from app.launcher.network import GivenWorker
        from app.launcher.progress import Steps
        from app.launcher.up import UpOptions
        from app.launcher.up import up as run_up
    options = UpOptions(
        home=home_at(home),
        variants=variant_names(variants),
        workers=tuple(GivenWorker.parse(text) for text in workers),
        engine=engine_named(engine),
        issue_keys=ready_keys,
        **given,
    )
    run_up(options, Steps(Console(stderr=True)))


@main.command()
@click.option("--config", type=click.Path(path_type=Path), help="Configuration (YAML).")
@click.option("--host", help="Overrides listen.host.")
@click.option("--port", type=click.IntRange(0, 65535), help="Overrides listen.port.")
@click.option("--processes", type=click.IntRange(min=1), help="Overrides listen.processes.")
@click.option("--check", is_flag=True, help="Say whether the configuration is sound, and end.")
def gateway(config: Path | None, host: str | None, port: int | None, processes: int | None, check: bool) -> None:
    """Run the gateway alone, in front of the workers that its configuration names.

    SIGHUP, or a change of the file, has it read again: models, workers and tenants.
    """
    from app.settings import load_settings

    settings = load_settings(config, host=host, port=port, processes=processes)
    from app.api.serve import check as check_settings
    from app.api.serve import serve
    from app.reload import Source

    if check:
        check_settings(settings)
        click.echo("the configuration is sound")
        return
    serve(settings, Source(config, host, port, processes) if config else None)


@main.group(epilog=KEYS_EXAMPLES)
def keys() -> None:
    """Make, show and end API keys. They are kept in the configuration's Redis, or in a file."""


def store_options(command: Command) -> Command:
    options = [
        click.option("--config", type=click.Path(path_type=Path),
                     help="The gateway's configuration (YAML): it names the Redis, and the secret of the digests."),
        click.option("--file", type=click.Path(path_type=Path),
                     help="Keep keys in this file instead; `auth.key_files` names it to the gateway."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@keys.command("create")
@click.option("--tenant", metavar="NAME", help="Who pays.  [default with --admin: operators]")
@click.option("--expires", metavar="90d", help="How long it works: s, m, h, d.  [default: until it is revoked]")
@click.option("--admin", is_flag=True, help="It opens the admin listener, too.")
@store_options
def create_key(tenant: str | None, expires: str | None, admin: bool, **store: Path | None) -> None:
    """Make a key and print it, this once."""
    from app.settings import TENANT_NAME
    from app.tenancy.keys import Scope

    name = tenant or ("operators" if admin else "")
    if not TENANT_NAME.match(name):
        raise click.UsageError("--tenant NAME: letters, digits and . _ - only, 64 at most.")
    scope, lifetime = Scope.ADMIN if admin else Scope.TENANT, duration(expires) if expires else None
    show_issued(with_registrar(lambda registrar: registrar.create(name, scope=scope, lifetime=lifetime), **store))


@keys.command("list")
@store_options
def list_keys(**store: Path | None) -> None:
    """Show all keys: whose they are, how they end, until when they work."""

    async def rows(registrar: Registrar) -> list[tuple[str, ...]]:
        used = await registrar.last_used()
        return [
            (key.id, f"…{key.hint}", key.tenant, key.scope, f"{key.created:%Y-%m-%d}",
             f"{key.expires:%Y-%m-%d %H:%M:%S}" if key.expires else "-", used.get(key.id, "-"))
            for key in await registrar.keys()
        ]  # fmt: skip

    for row in [("ID", "KEY", "TENANT", "SCOPE", "CREATED", "EXPIRES", "LAST USED"), *with_registrar(rows, **store)]:
        click.echo("{:22}{:8}{:24}{:9}{:12}{:21}{}".format(*row))


@keys.command("revoke")
@click.argument("key_id")
@store_options
def revoke_key(key_id: str, **store: Path | None) -> None:
    """End a key now: all gateways refuse it within a second."""
    ended = with_registrar(lambda registrar: registrar.revoke(key_id), **store)
    click.echo(f"{ended.id} of tenant {ended.tenant} has ended.", err=True)


@keys.command("rotate")
@click.argument("key_id")
@click.option("--overlap", metavar="1d", default="1d", show_default=True, help="How long the old key works on.")
@store_options
def rotate_key(key_id: str, overlap: str, **store: Path | None) -> None:
    """Make a key like another and print it; the other ends after a while."""
    after = duration(overlap)
    show_issued(with_registrar(lambda registrar: registrar.rotate(key_id, after), **store))


def with_registrar(work: Callable[[Registrar], Awaitable[T]], *, config: Path | None, file: Path | None) -> T:
    """What `work` brings, done on the keys of `file`, or else where the configuration keeps them."""
    from app.credentials import server_secret
    from app.settings import load_settings
    from app.tenancy.keys import Pepper
    from app.tenancy.registrar import Registrar
    from app.tenancy.stores import writable_store

    settings = load_settings(config)

    async def do() -> T:
        registrar = Registrar(writable_store(settings, file), Pepper(server_secret(settings.auth)), time.time)
        try:
            return await work(registrar)
        finally:
            await registrar.aclose()

    return asyncio.run(do())


def ready_keys(settings: Settings, file: Path) -> ReadyKeys:
    """A tenant's and an admin's key in a new file, for `sluice up`."""
    from app.credentials import server_secret
    from app.launcher.serving import ReadyKeys
    from app.tenancy.keys import Pepper, Scope
    from app.tenancy.registrar import Registrar
    from app.tenancy.stores import FileKeys

    registrar = Registrar(FileKeys(file), Pepper(server_secret(settings.auth)), time.time)

    async def issue() -> ReadyKeys:
        tenant = await registrar.create("up")
        return ReadyKeys(tenant.text, (await registrar.create("operators", scope=Scope.ADMIN)).text)

    return asyncio.run(issue())


def show_issued(issued: Issued) -> None:
    """The key itself on stdout and alone there, so that it can be taken from a pipe."""
    key = issued.key
    until = f"until {key.expires:%Y-%m-%d %H:%M:%S} UTC" if key.expires else "until it is revoked"
    click.echo(f"{key.id} for tenant {key.tenant}, scope {key.scope}, {until}. It is shown this once:", err=True)
    click.echo(issued.text)


def duration(text: str) -> timedelta:
    """`90d`, `12h`, `30m`, `45s`. Raises click.UsageError."""
    number, unit = text[:-1], text[-1:]
    if not (number.isdigit() and len(number) < 6 and unit in DURATION_UNITS):
        raise click.UsageError(f"{text}: expected a duration like 90d, 12h, 30m or 45s.")
    return timedelta(seconds=int(number) * DURATION_UNITS[unit])


@main.command(epilog=WORKER_EXAMPLES)
@click.argument("checkpoint")
@click.option("--served-model", required=True, metavar="MODEL:VARIANT", help="What the worker calls its model.")
@click.option("--port", type=click.IntRange(1, 65535), required=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--cores", metavar="0,1,…", default="", help="CPU cores to bind to.  [default: vLLM's choice]")
@click.option("--api-key-file", type=click.Path(path_type=Path),
              help="Holds the key that requests must show; the gateway's configuration names it as well.")  # fmt: skip
@engine_options
@home_option
@click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED)
def worker(
    home: Path | None,
    engine: str,
    cores: str,
    api_key_file: Path | None,
    vllm_arguments: tuple[str, ...],
    **given: Any,
) -> None:
    """Run one vLLM worker in the foreground. Its metrics and probes are open to all who reach it, and without
    --api-key-file so is the model: keep it on a private network."""
    from app.credentials import read_secret

    with require_extra("up"):
        from app.launcher.engines import choose_engine, require_installed
        from app.launcher.machine import inspect_machine
        from app.launcher.processes import WorkerOptions, worker_arguments, worker_environment
    machine = inspect_machine()
    choice = require_installed(choose_engine(engine_named(engine), home_at(home), machine))
    given = {name: value for name, value in given.items() if value is not None}
    options = WorkerOptions(cores=core_ids(cores), extra=vllm_arguments, **given)
    arguments = worker_arguments(choice.python, options, choice.engine, machine)
    environment = worker_environment(choice.python, options, choice.engine, machine, os.environ)
    if key := read_secret(api_key_file, None):
        environment["VLLM_API_KEY"] = key  # not an argument: those are everybody's to see
    os.execve(arguments[0], arguments, environment)  # noqa: S606 - replaced, so that signals reach vLLM itself


@main.group()
def batch() -> None:
    """Run many requests from a file, in the capacity that others leave over."""


@batch.command("run", epilog=BATCH_EXAMPLES)
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Where the results go.")
@click.option("--base-url", envvar="OPENAI_BASE_URL", default="http://127.0.0.1:8000/v1", show_default=True)
@click.option("--api-key", envvar="OPENAI_API_KEY", default="none", help="[default: $OPENAI_API_KEY]")
@click.option("--model", help="Ask all lines of this model, whatever they say.")
@click.option("--window", default="24h", show_default=True, help="Time after which what is left is given up.")
def batch_run(source: Path, **given: Any) -> None:
    """Upload INPUT (OpenAI's batch format, JSON Lines), follow the batch, download the results.

    The same command goes on after Ctrl-C. Exit code 1 if any line failed; those are in OUTPUT's name with `.errors`.
    """
    with require_extra("up"):
        from rich.console import Console

        from app.batches.client import Order, run
    run(Order(source=source, **given), Console(stderr=True))


@main.command(epilog=COMPRESS_EXAMPLES)
@click.argument("model", required=False)
@click.option("--recipe", "recipe_name", metavar="NAME", help="How, or several joined by +; `--list` shows them.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
              help="Text to measure on: plain, or .jsonl with `text` or `messages`.  [default: ours]")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="Directory to write; must not exist or be empty.")
@click.option("--name", help="Public name of the model.  [default: made from MODEL]")
@click.option("--variant", help="Name of the variant.  [default: the recipe's]")
@click.option("--parameter", "--set", "settings", metavar="NAME=VALUE", multiple=True,
              help="A parameter of the recipe. Repeatable.")  # fmt: skip
@click.option("--list", "show", is_flag=True, help="Show the recipes and their parameters.")
@home_option
def compress(home: Path | None, show: bool, **given: Any) -> None:
    """Make a variant of MODEL: a hub id, a checkpoint directory, a .gguf file, or smollm2."""
    if show:
        list_recipes()
        return
    if missing := next((name for name in ("model", "recipe_name", "output") if not given[name]), None):
        wanted = {"model": "MODEL", "recipe_name": "--recipe NAME", "output": "--output DIR"}[missing]
        raise click.UsageError(f"{wanted} is missing.")
    run_recipe(home_at(home), **given)


def list_recipes() -> None:
    with require_extra("up"):
        from rich.console import Console
    from app.recipes.listing import tables

    console = Console()
    for table in tables():
        console.print(table)


def run_recipe(
    home: Home,
    *,
    model: str,
    recipe_name: str,
    output: Path,
    name: str | None,
    variant: str | None,
    settings: tuple[str, ...],
    calibration: Path | None,
) -> None:
    with require_extra("up"):
        from rich.console import Console

        from app.launcher.checkpoints import resolve_base
        from app.launcher.preparation import Order, compress_into
        from app.launcher.progress import Steps
    from app.recipes.book import find_recipe
    from app.recipes.calibration import read_calibration

    recipe = find_recipe(recipe_name)
    parameters = recipe.with_defaults(dict(assignment(text) for text in settings))
    if calibration:
        if not recipe.calibrates:
            raise ConfigurationError(f"--calibration: recipe {recipe.name!r} needs no text")
        read_calibration(calibration)
    order = Order(
        base=resolve_base(model, name),
        recipe=recipe.name,
        variant=variant or recipe.name,
        parameters=parameters,
        calibration=calibration.absolute() if calibration else None,
    )
    compress_into(output.absolute(), order, home, Steps(Console(stderr=True)))
    click.echo(output)


def assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigurationError(f"--parameter {text}: expected NAME=VALUE")
    return name, value


@main.command(epilog=EVALUATE_EXAMPLES)
@click.argument("model")
@click.option("--variants", metavar="A,B", default="", help="Which to measure, beside dense.  [default: all there are]")
@click.option("--output", type=click.Path(path_type=Path), help="Directory for the page: variants.md, .html, .svg.")
@click.option("--report", is_flag=True, help="Measure nothing: write the page from cards that are there.")
@click.option("--only", type=click.Choice(["quality", "speed"]), help="Measure this anew, keep the rest of each card.")
@click.option("--texts", type=click.Path(path_type=Path), help="Text to compare on (JSON Lines with a `text`).")
@click.option(
    "--items", type=click.IntRange(0, 1000), default=40, show_default=True, help="Of each task; 0 for no tasks."
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of items and resampling.")
@click.option(
    "--price-per-hour", type=click.FloatRange(min=0), default=0.1, show_default=True, help="Of the machine, USD."
)
@click.option("--config", type=click.Path(path_type=Path), help="Configuration whose quality_gate of MODEL applies.")
@click.option("--engine", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@home_option
def evaluate(
    home: Path | None, model: str, variants: str, engine: str, config: Path | None, output: Path | None, **given: Any
) -> None:
    """Measure the variants of MODEL (a name, or a directory of variants) and write their cards into their manifests."""
    with require_extra("up"):
        from rich.console import Console

        from app.evaluation.evaluate import Order
        from app.evaluation.evaluate import evaluate as run_evaluation
        from app.launcher.progress import Steps
    order = Order(
        home=home_at(home), model=model, variants=listed(variants), output=output.absolute() if output else None,
        engine=engine_named(engine), thresholds=quality_gate(config, model), **given,
    )  # fmt: skip
    if page := run_evaluation(order, Steps(Console(stderr=True))):
        click.echo(page)


def quality_gate(config: Path | None, model: str) -> QualityGate:
    """The configured thresholds of `model`. Raises ConfigurationError where it is not configured."""
    from app.settings import QualityGate, load_settings

    if config is None:
        return QualityGate()
    settings = load_settings(config)
    found = next((one.quality_gate for one in settings.models if one.name == model), None)
    if found is None:
        raise ConfigurationError(f"{config}: models: {model!r} is not among them")
    return found


def listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def variant_names(text: str) -> tuple[str, ...]:
    """The names in `--variants`. Raises ConfigurationError for one that no recipe makes, or that comes twice."""
    from app.recipes.book import find_recipe

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(set(names)) != len(names):
        raise ConfigurationError(f"--variants {text}: a variant is named twice")
    return tuple(find_recipe(name).name for name in names)


def core_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(core) for core in text.split(",") if core.strip())
    except ValueError:
        raise ConfigurationError(f"--cores {text}: expected numbers parted by commas") from None


def engine_named(name: str) -> Any:
    from app.launcher.processes import Engine

    return None if name == "auto" else Engine(name)


def home_at(given: Path | None) -> Home:
    from app.launcher.home import Home

    return Home.at(given, os.environ)


@contextmanager
def require_extra(extra: str) -> Iterator[None]:
    """Turns the absence of an optional dependency into one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "app":
            raise
        raise SluiceError(f"{error.name} is not installed: `pip install 'sluice[{extra}]'` brings it") from None


if __name__ == "__main__":
    sys.exit(main())
