"""`sluice up`: from a bare machine to a served model, and back to nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

from app.errors import ConfigurationError
from app.launcher.checkpoints import Base, Checkpoint, guess_weights_bytes, resolve_base
from app.launcher.engines import EngineChoice, choose_engine
from app.launcher.environments import WORKER_CPU, Installer
from app.launcher.gateway_config import ServedWorker, gateway_config
from app.launcher.home import Home, locked, make_directory
from app.launcher.machine import Machine, inspect_machine, require_libnuma, require_memory, shares
from app.launcher.network import GivenWorker, free_port, identify, require_free
from app.launcher.preparation import DEFAULT_VARIANTS, Workshop
from app.launcher.processes import (
    DEFAULT_MAX_MODEL_LEN,
    DEFAULT_MAX_NUM_SEQS,
    Engine,
    ProcessSpec,
    WorkerOptions,
    worker,
    worker_memory,
)
from app.launcher.progress import Steps
from app.launcher.serving import SERVING_STEPS, ReadyKeys, Start, find_valkey, serve
from app.settings import Settings, load_settings

GPU_MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The command line of `sluice up`; None and empty mean that a value was not given.

    `issue_keys` makes keys in a new file, for a gateway that asks for some and has none.
    """

    home: Home
    model: str | None = None
    name: str | None = None
    variants: tuple[str, ...] = ()
    workers: tuple[GivenWorker, ...] = ()
    config: Path | None = None
    host: str | None = None
    port: int | None = None
    processes: int | None = None
    engine: Engine | None = None
    max_model_len: int | None = None
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS
    kv_cache_bytes: int | None = None
    run: Path | None = None
    prepare_only: bool = False
    issue_keys: Callable[[Settings, Path], ReadyKeys] | None = None

    @property
    def run_directory(self) -> Path:
        return self.run.absolute() if self.run else self.home.run

    @property
    def logs(self) -> Path:
        return self.run.absolute() / "logs" if self.run else self.home.logs


@dataclass(frozen=True, slots=True)
class EngineRoom:
    """What the workers that this start runs itself are made of."""

    base: Base
    machine: Machine
    choice: EngineChoice


def up(options: UpOptions, steps: Steps) -> None:
    """Prepares, starts, and serves until told to stop. Raises SluiceError; in no case is anything left running."""
    signal.signal(signal.SIGTERM, _interrupt)
    settings, user = _read_config(options)
    given = [identify(worker) for worker in options.workers]
    room = None if given else _engine_room(options, user)
    if options.prepare_only:
        _prepare(options, room, steps)
        return
    require_free(settings.listen.host, settings.listen.port)
    valkey = None if settings.redis else find_valkey()
    with ExitStack() as held:
        held.enter_context(locked(options.run_directory / "lock", wait_s=0))
        steps.expect(SERVING_STEPS)
        own = _own_workers(options, room, _prepare(options, room, steps)) if room else []
        served = (*given, *(worker for worker, _ in own))
        key_file, keys = _ready_keys(options, settings)
        processes = tuple(spec for _, spec in own)
        start = Start(settings, valkey, served, processes, make_directory(options.logs), keys)
        serve(start, lambda redis_url: _write_config(options, user, served, redis_url, key_file), steps)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM during the preparation is the same as Ctrl-C."""
    raise KeyboardInterrupt


def _read_config(options: UpOptions) -> tuple[Settings, dict[str, Any]]:
    """The settings that the gateway will have but for our own workers, and the user's file as it stands."""
    port = free_port(options.host or "127.0.0.1") if options.port == 0 else options.port
    settings = load_settings(options.config, host=options.host, port=port, processes=options.processes)
    user = yaml.safe_load(options.config.read_text(encoding="utf-8")) if options.config else {}
    return settings, user


def _ready_keys(options: UpOptions, settings: Settings) -> tuple[Path | None, ReadyKeys | None]:
    """Keys of this start alone, where keys are asked for and the configuration does not say where they are."""
    if options.issue_keys is None or not settings.is_guarded or settings.auth.key_files or settings.redis:
        return None, None
    path = options.run_directory / "keys.yaml"
    path.unlink(missing_ok=True)
    return path, options.issue_keys(settings, path)


def _engine_room(options: UpOptions, user: Mapping[str, Any]) -> EngineRoom:
    """Decides what would run, and refuses what could not. Raises SluiceError before anything is changed."""
    machine = inspect_machine()
    base = resolve_base(options.model, options.name)
    if any(model["name"] == base.model for model in user.get("models") or []):
        raise ConfigurationError(f"{options.config}: models: {base.model!r} is the model that is started here")
    choice = choose_engine(options.engine, options.home, machine)
    if choice.engine is Engine.CPU and not options.prepare_only:
        require_libnuma(machine)
        names = options.variants or DEFAULT_VARIANTS
        need = worker_memory(guess_weights_bytes(base), options.kv_cache_bytes, machine)
        require_memory(machine, len(names) * need, f"a vLLM worker for each of {base.model}:{', '.join(names)}")
    return EngineRoom(base, machine, choice)


def _prepare(options: UpOptions, room: EngineRoom | None, steps: Steps) -> list[Checkpoint]:
    if room is None:
        return []
    environments = (WORKER_CPU,) if room.choice.is_ours else ()
    with locked(make_directory(options.home.root) / "lock"):
        workshop = Workshop(options.home, Installer.of_this_machine())
        work = workshop.survey(room.base, options.variants, environments)
        workshop.require_disk(work, room.base)
        steps.expect(work.steps)
        workshop.install(work.environments, steps)
        return workshop.obtain(room.base, options.variants, steps)


def _own_workers(
    options: UpOptions, room: EngineRoom, checkpoints: Sequence[Checkpoint]
) -> list[tuple[ServedWorker, ProcessSpec]]:
    """One worker per variant. Several share the cores evenly; a lone one keeps to vLLM's own choice of them."""
    cores = shares(room.machine.cores, len(checkpoints)) if len(checkpoints) > 1 else [()]
    return [
        _own_worker(options, room, checkpoint, share, len(checkpoints))
        for checkpoint, share in zip(checkpoints, cores, strict=True)
    ]


def _own_worker(
    options: UpOptions, room: EngineRoom, checkpoint: Checkpoint, cores: tuple[int, ...], count: int
) -> tuple[ServedWorker, ProcessSpec]:
    port = free_port()
    chosen = WorkerOptions(
        checkpoint=str(checkpoint.directory),
        served_model=checkpoint.public_name,
        port=port,
        max_model_len=options.max_model_len or min(DEFAULT_MAX_MODEL_LEN, checkpoint.context_length or sys.maxsize),
        max_num_seqs=options.max_num_seqs,
        kv_cache_bytes=options.kv_cache_bytes,
        cores=cores,
        gpu_memory_share=GPU_MEMORY_SHARE / count,
    )
    log = options.logs / f"worker-{checkpoint.variant}.log"
    spec = worker(room.choice.python, chosen, room.choice.engine, room.machine, os.environ, log)
    served = ServedWorker(
        model=checkpoint.model,
        variant=checkpoint.variant,
        url=f"http://127.0.0.1:{port}",
        served_model=checkpoint.public_name,
        slots=options.max_num_seqs,
        quantization=checkpoint.quantization,
        manifest=checkpoint.manifest,
    )
    return served, spec


def _write_config(
    options: UpOptions,
    user: Mapping[str, Any],
    workers: Sequence[ServedWorker],
    redis_url: str | None,
    key_file: Path | None,
) -> Path:
    """`gateway.yaml` in the run directory, checked the way the gateway will check it. Raises ConfigurationError."""
    path = options.run_directory / "gateway.yaml"
    config = gateway_config(user, workers, redis_url, key_file, options.run_directory / "batches")
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    load_settings(path)
    return path
