"""A scriptable fake of one vLLM 0.32 worker, true to it on the wire (tests/contract holds both to the same suite).

In a test::

    async with FakeWorker(model="m:dense") as worker:
        worker.inject("die_after:5")          # for every request, until worker.heal()
        ...                                   # talk to worker.url
        await worker.wait_for(aborted=1)      # no sleeping

As a process, for SIGKILL and SIGSTOP: `python -m tests.fakes.worker --port 0 --model m` prints one JSON line with its
`url` when it listens. Faults: see `tests.fakes.faults.CATALOGUE`; extra request fields: `x_fault`, `x_timing`, `nonce`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from http import HTTPStatus
from typing import Self

from tests.fakes.control import Control
from tests.fakes.delivery import dump
from tests.fakes.engine import Timing
from tests.fakes.faults import parse_faults
from tests.fakes.inference import Inference
from tests.fakes.observation import Counts, Observer, Received
from tests.fakes.refusals import Refusal, detail
from tests.fakes.server import Exchange, Server
from tests.fakes.state import VERSION, Options, State
from tests.ports import free_port

DRAIN_S = 3600.0


class FakeWorker:
    """One worker. `model`, `timing` and faults may be changed while it runs; counters live as long as the object.

    `task` is generate, embed or score; `max_num_queued_reqs`, `prompt_tokens_details`, `request_id_headers` and
    `server_load_tracking` are vLLM's flags of the like name, off by default as there. `kill` is what a query of death
    does, by default `crash`. With `tls` it speaks HTTPS.
    """

    def __init__(
        self,
        model: str = "m",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        fault: str = "",
        timing: Timing | None = None,
        task: str = "generate",
        max_model_len: int = 2048,
        max_num_seqs: int = 256,
        max_num_queued_reqs: int | None = None,
        prompt_tokens_details: bool = False,
        request_id_headers: bool = False,
        server_load_tracking: bool = False,
        kill: Callable[[], None] | None = None,
        tls: ssl.SSLContext | None = None,
        version: str = VERSION,
    ) -> None:
        self.host = host
        self.port = port
        self.crashed = False
        self._tls = tls
        options = Options(
            task=task,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_queued_reqs=max_num_queued_reqs,
            prompt_tokens_details=prompt_tokens_details,
            request_id_headers=request_id_headers,
            server_load_tracking=server_load_tracking,
            version=version,
        )
        self._observer = Observer(self._gauges)
        self._state = State(model, options, timing or Timing(), parse_faults(fault), self._observer)
        self._inference = Inference(self._state, kill or self.crash)
        self._control = Control(self._state)
        self._server = Server(self._handle, self._observer.changed)

    def _gauges(self) -> dict[str, int]:
        engine = self._state.engine
        return {"running": engine.running, "waiting": engine.waiting, "connections": self.connections}

    # life

    async def start(self) -> None:
        """Listen, on the same port as before if it ran before. Raises OSError when the port is taken."""
        self._state.boot()
        self.crashed = False
        self.port = await self._server.start(self.host, self.port or free_port(), self._tls)

    async def stop(self) -> None:
        """Stop listening, reset all connections, wait for all handlers. Safe to call twice.

        Raises the first defect that a handler died of, so that a bug of the fake fails its test.
        """
        await self._server.stop()

    def crash(self) -> None:
        """Die as a killed process does: no answer ends, every connection is reset, the port refuses."""
        self.crashed = True
        self._server.sever()

    async def drain(self) -> None:
        """Refuse new connections and wait until no request is open."""
        self._server.close_listener()
        await self._observer.wait_for(DRAIN_S, {"open": 0})

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # a test's view

    @property
    def url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://{self.host}:{self.port}"

    @property
    def counts(self) -> Counts:
        return self._observer.counts

    @property
    def requests(self) -> list[Received]:
        """The latest inference requests, oldest first, at most 2,000."""
        return list(self._observer.requests)

    @property
    def probes(self) -> Mapping[str, int]:
        """How often each control route was asked."""
        return self._observer.probes

    @property
    def connections(self) -> int:
        """TCP connections open now."""
        return len(self._server.connections)

    async def wait_for(self, timeout_s: float = 20.0, **expected: int) -> None:
        """Wait for numbers: open, running, waiting, connections exactly; seen, finished, aborted, broken at least.

        Raises TimeoutError that names the numbers found instead.
        """
        await self._observer.wait_for(timeout_s, expected)

    async def aborted(self, count: int = 1, timeout_s: float = 20.0) -> None:
        """Wait until that many clients have left before their answer was whole."""
        await self.wait_for(timeout_s, aborted=count)

    # a test's hand

    @property
    def model(self) -> str:
        return self._state.model

    @model.setter
    def model(self, name: str) -> None:
        self._state.model = name

    @property
    def timing(self) -> Timing:
        return self._state.timing

    @timing.setter
    def timing(self, timing: Timing) -> None:
        self._state.timing = timing

    def inject(self, fault: str, times: int | None = None) -> None:
        """Have a fault from now on, for the next `times` inference requests or until `heal`. Raises ValueError."""
        self._state.inject(fault, times)

    def heal(self, *, for_good: bool = False) -> None:
        """Have no fault, and let every request that hangs go on; `for_good` also those that are yet to come."""
        self._state.heal(for_good=for_good)

    def hold(self) -> None:
        """Let no token out: requests are taken and admitted, then wait for `resume`."""
        self._state.engine.hold()

    def resume(self) -> None:
        self._state.engine.resume()

    # routing

    async def _handle(self, exchange: Exchange) -> None:
        try:
            await self._route(exchange)
        except Refusal as answer:
            headers = [*answer.headers, *self._state.headers(exchange)]
            await exchange.answer(answer.status, dump(answer.body), headers=headers)

    async def _route(self, exchange: Exchange) -> None:
        path, method = exchange.request.path, exchange.request.method
        methods, handler = self._control.routes.get(path, (("POST",), self._inference.serve))
        if path not in self._control.routes and path not in self._inference.paths:
            raise detail(HTTPStatus.NOT_FOUND)
        if method not in methods:
            raise detail(HTTPStatus.METHOD_NOT_ALLOWED, (("allow", ", ".join(methods)),))
        if path in self._control.routes:
            self._observer.probes[path] += 1
        await handler(exchange)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.worker", description="A fake vLLM worker.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="m")
    parser.add_argument("--task", choices=("generate", "embed", "score"), default="generate")
    parser.add_argument("--fault", default="")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--prompt-tokens-details", action="store_true")
    for field in fields(Timing):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=0.0)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0, help="seconds that open requests get at SIGTERM")
    return parser.parse_args()


async def _run(options: argparse.Namespace) -> None:
    worker = FakeWorker(
        options.model,
        host=options.host,
        port=options.port,
        fault=options.fault,
        timing=Timing(**{field.name: getattr(options, field.name) for field in fields(Timing)}),
        task=options.task,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        prompt_tokens_details=options.prompt_tokens_details,
        kill=lambda: os.kill(os.getpid(), signal.SIGKILL),
    )
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    async with worker:
        print(json.dumps({"url": worker.url, "model": worker.model}), flush=True)
        await asked.wait()
        with suppress(TimeoutError):
            await asyncio.wait_for(worker.drain(), options.shutdown_timeout)


if __name__ == "__main__":
    asyncio.run(_run(_arguments()))
