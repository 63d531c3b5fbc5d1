"""A real vLLM worker for the contract suite, started exactly as `sluice up` starts one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx

from app.launcher.home import Home
from app.launcher.machine import inspect_machine
from app.launcher.processes import (
    DEFAULT_MAX_NUM_SEQS,
    Engine,
    WorkerOptions,
    worker_arguments,
    worker_environment,
)
from tests.ports import free_port
from tests.processes import Process

MODEL, VARIANT = "smollm2", "dense"
START_TIMEOUT_S = 900.0


class MissingEnvironment(Exception):
    """There is no vLLM environment or no checkpoint to run the suite with."""


def _required(path: Path, what: str) -> Path:
    if not path.exists():
        raise MissingEnvironment(f"the vllm tests need {what} at {path}; `make up` once prepares it")
    return path


@dataclass(frozen=True, slots=True)
class RealWorker:
    """A vLLM that starts, or runs."""

    process: Process
    port: int
    checkpoint: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def proven(self) -> Self:
        """Itself, once it has generated a token. Raises TimeoutError or RuntimeError with vLLM's latest output."""
        self.process.wait_for_line("Application startup complete", START_TIMEOUT_S)
        # Only a generated token proves the engine: /health and start-up succeed without one.
        answer = httpx.post(f"{self.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=300)
        answer.raise_for_status()
        return self


@contextmanager
def started_worker(
    served_model: str,
    *,
    variant: str = VARIANT,
    checkpoint: Path | None = None,
    core: int | None = None,
    dtype: str | None = None,
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
    extra: tuple[str, ...] = (),
) -> Iterator[RealWorker]:
    """Start a variant of the default model, or `checkpoint`; on one core if it is named. Raises MissingEnvironment."""
    home, machine = Home.at(None, os.environ), inspect_machine()
    python = _required(home.environment("worker-cpu") / "bin" / "python", "vLLM's environment")
    checkpoint = _required(checkpoint or home.checkpoint(MODEL, variant), "a checkpoint")
    options = WorkerOptions(
        checkpoint=str(checkpoint),
        served_model=served_model,
        port=free_port(),
        max_num_seqs=max_num_seqs,
        cores=() if core is None else (core,),
        extra=extra if dtype is None else ("--dtype", dtype, *extra),
    )
    environment = worker_environment(python, options, Engine.CPU, machine, os.environ)
    with Process(worker_arguments(python, options, Engine.CPU, machine), environment) as process:
        yield RealWorker(process, options.port, checkpoint)


@contextmanager
def real_worker(served_model: str) -> Iterator[str]:
    """Run the dense variant and yield its URL once it has generated a token.

    Raises MissingEnvironment, TimeoutError or RuntimeError with vLLM's latest output.
    """
    with started_worker(served_model) as worker:
        yield worker.proven().url
