"""`sluice up`, `sluice gateway`, `sluice worker`: what serves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from app.cli.keys import ready_keys
from app.cli.options import Command, home_at, home_option, require_extra
from app.errors import ConfigurationError

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
WORKER_EXAMPLES = """
\b
Examples:
  sluice worker ~/models/smollm2/w8a8 --served-model smollm2:w8a8 --port 9001
  sluice worker ORG/MODEL --served-model qwen:dense --port 9001 --engine cuda -- --max-num-batched-tokens 4096
"""


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


@click.command(epilog=UP_EXAMPLES)
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


@click.command()
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


@click.command(epilog=WORKER_EXAMPLES)
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
    choice = require_installed(choose_engine(engine_named(engine), home_at(home), machine), machine)
    given = {name: value for name, value in given.items() if value is not None}
    options = WorkerOptions(cores=core_ids(cores), extra=vllm_arguments, **given)
    arguments = worker_arguments(choice.python, options, choice.engine, machine)
    environment = worker_environment(choice.python, options, choice.engine, machine, os.environ)
    if key := read_secret(api_key_file, None):
        environment["VLLM_API_KEY"] = key  # not an argument: those are everybody's to see
    os.execve(arguments[0], arguments, environment)  # noqa: S606 - replaced, so that signals reach vLLM itself


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
