"""The processes of a measurement: started on given cores, ready before use, gone afterwards."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx

from loadtest.client import CHAT_PATH, Address

READY_S = 30.0
STOP_S = 10.0
ROOT = Path(__file__).resolve().parents[1]
"""Where `python -m loadtest…` and `python -m app` find their packages."""


class ProcessError(Exception):
    """A process did not start, or did not stay."""


def free_address() -> Address:
    """A loopback port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address(probe.getsockname()[1])


@contextmanager
def _on_cores(cores: set[int]) -> Iterator[None]:
    """What is started inside inherits `cores`, with all the threads it ever starts."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


@asynccontextmanager
async def running(
    argv: Sequence[str], cores: set[int], log: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `argv` in a process group of its own, its output in `log`; the whole group is gone when the block ends.

    `environment` is all of its environment, None for this process' own.

    Raises:
        ProcessError: it cannot be started.
    """
    try:
        with log.open("wb") as output, _on_cores(cores):
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise ProcessError(f"cannot start {argv[0]}: {error}") from error
    try:
        yield process
    finally:
        await asyncio.shield(_stop(process))


async def _stop(process: asyncio.subprocess.Process) -> None:
    for stop in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, stop)
        except ProcessLookupError:
            break
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            continue
    await process.wait()


async def until_ready(process: asyncio.subprocess.Process, address: Address, path: str | None, log: Path) -> None:
    """Wait until `path`, if given, answers 200 and a one-token chat completion comes back.

    Raises:
        ProcessError: the process ended, or READY_S passed; the message carries its last words.
    """
    obstacle = "no answer"
    try:
        async with asyncio.timeout(READY_S), httpx.AsyncClient(base_url=address.url, timeout=5) as client:
            while obstacle := await _obstacle(client, path):
                if process.returncode is not None:
                    raise ProcessError(f"{log.stem} ended with status {process.returncode}: {_last_lines(log)}")
                await asyncio.sleep(0.1)
    except TimeoutError:
        last = f"{obstacle}; {_last_lines(log)}"
        raise ProcessError(f"{log.stem} not ready after {READY_S:g} s: {last}") from None


async def until_workers_ready(client: httpx.AsyncClient, gateway: Address, limit_s: float) -> None:
    """Wait until the gateway has proven all its workers. Raises ProcessError."""
    try:
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    states = (await client.get(f"{gateway.url}/readyz")).json()["workers"].values()
                    if all(state["state"] == "ready" for state in states):
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise ProcessError(f"the gateway has not seen all workers ready within {limit_s:g} s") from None


async def _obstacle(client: httpx.AsyncClient, path: str | None) -> str:
    """What keeps it from being ready; empty when nothing does."""
    one_token = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    try:
        answer = await client.get(path) if path else None
        if answer is None or answer.status_code == 200:
            answer = await client.post(CHAT_PATH, json=one_token)
    except httpx.TransportError as error:
        return str(error) or type(error).__name__
    return "" if answer.status_code == 200 else f"{answer.url.path} answers {answer.status_code} {answer.text[:300]}"


def _last_lines(log: Path, count: int = 5) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return " | ".join(lines[-count:]) or "it wrote nothing"
