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
import secrets
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import fields
from http import HTTPStatus
from typing import Any, Self

from tests.fakes import dialects, pooling
from tests.fakes.answers import Draft, chat_body, chunks, completion_body
from tests.fakes.delivery import Cut, EventStream, dump, send_body
from tests.fakes.engine import Engine, PrefixCache, Timing
from tests.fakes.faults import Faults, parse_faults
from tests.fakes.generation import generate
from tests.fakes.metrics_page import CONTENT_TYPE, Readings, Statistics, render
from tests.fakes.observation import Counts, Observer, Received
from tests.fakes.parsing import Body, Job, Refusal, bad_request, detail, parse_job, read_json, refusal
from tests.fakes.server import Exchange, Server
from tests.fakes.vocabulary import Vocabulary, chat_pieces, pieces

VERSION = "0.32.0"
BLOCK_SIZE = 32
BLOCKS = 182
QUERY_OF_DEATH = "kill_me_prompt"

_GENERATING = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
_POOLING = {
    "embed": {"/v1/embeddings": pooling.embeddings_body},
    "score": {"/v1/score": pooling.score_body, "/v1/rerank": pooling.rerank_body},
}
_ID_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-", "responses": "resp_", "messages": "chatcmpl-"}
_BODIES: Mapping[str, Callable[[Draft], dict[str, Any]]] = {
    "chat": chat_body,
    "completion": completion_body,
    "responses": dialects.responses_body,
    "messages": dialects.messages_body,
}


class FakeWorker:
    """One worker. `model`, `timing` and faults may be changed while it runs; counters live as long as the object.

    `task` is generate, embed or score; `max_num_queued_reqs`, `prompt_tokens_details`, `request_id_headers` and
    `server_load_tracking` are vLLM's flags of the like name, off by default as there.
    """

    def __init__(
        self,
        model: str = "m",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        task: str = "generate",
        fault: str = "",
        timing: Timing | None = None,
        max_model_len: int = 2048,
        max_num_seqs: int = 256,
        max_num_queued_reqs: int | None = None,
        prompt_tokens_details: bool = False,
        request_id_headers: bool = False,
        server_load_tracking: bool = False,
    ) -> None:
        self.model = model
        self.host = host
        self.port = port
        self.timing = timing or Timing()
        self.crashed = False
        self._task = task
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_num_queued_reqs = max_num_queued_reqs
        self._prompt_tokens_details = prompt_tokens_details
        self._request_id_headers = request_id_headers
        self._server_load_tracking = server_load_tracking
        self._observer = Observer(self._gauges)
        self._vocabulary = Vocabulary()
        self._faults = parse_faults(fault)
        self._fault_uses: int | None = None
        self._stuck = asyncio.Event()
        self._kill: Callable[[], None] = self.crash
        self._boot()

    def _boot(self) -> None:
        """A new process: an empty engine and cache, counters of its own metrics at zero."""
        cache = PrefixCache(BLOCK_SIZE, BLOCKS)
        self._engine = Engine(self._max_num_seqs, cache, self._observer.changed)
        self._statistics = Statistics()
        self._server = Server(self._handle, self._observer.changed)
        self.crashed = False

    def _gauges(self) -> dict[str, int]:
        return {"running": self._engine.running, "waiting": self._engine.waiting, "connections": self.connections}

    # life

    async def start(self) -> None:
        """Listen, on the same port as before if it ran before. Raises OSError when the port is taken."""
        self._boot()
        self.port = await self._server.start(self.host, self.port)

    async def stop(self) -> None:
        """Stop listening, reset all connections, wait for all handlers. Safe to call twice."""
        await self._server.stop()

    def crash(self) -> None:
        """Die as a killed process does: no answer ends, every connection is reset, the port refuses."""
        self.crashed = True
        self._server.sever()

    def dies_by(self, kill: Callable[[], None]) -> None:
        """What `kill_me_prompt` does, in place of `crash`."""
        self._kill = kill

    async def drain(self) -> None:
        """Refuse new connections and wait until no request is open."""
        self._server.close_listener()
        await self._observer.wait_for(3600, {"open": 0})

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # a test's view

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

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

    async def wait_for(self, timeout_s: float = 5.0, **expected: int) -> None:
        """Wait for numbers: open, running, waiting, connections exactly; seen, finished, aborted, broken at least.

        Raises TimeoutError that names the numbers found instead.
        """
        await self._observer.wait_for(timeout_s, expected)

    async def aborted(self, count: int = 1, timeout_s: float = 5.0) -> None:
        """Wait until that many clients have left before their answer was whole."""
        await self.wait_for(timeout_s, aborted=count)

    # a test's hand

    def inject(self, fault: str, times: int | None = None) -> None:
        """Have a fault from now on, for the next `times` inference requests or until `heal`. Raises ValueError."""
        self._faults = parse_faults(fault)
        self._fault_uses = times

    def heal(self) -> None:
        """Have no fault, and let every request that hangs go on."""
        self._faults = Faults()
        self._fault_uses = None
        self._stuck.set()
        self._stuck = asyncio.Event()

    def hold(self) -> None:
        """Let no token out: requests are taken and admitted, then wait for `resume`."""
        self._engine.hold()

    def resume(self) -> None:
        self._engine.resume()

    # routes

    async def _handle(self, exchange: Exchange) -> None:
        try:
            await self._route(exchange)
        except Refusal as answer:
            headers = [*answer.headers, *self._headers(exchange)]
            await exchange.answer(answer.status, dump(answer.body), headers=headers)

    async def _route(self, exchange: Exchange) -> None:
        path, method = exchange.request.path, exchange.request.method
        if path in self._inference_paths():
            _require(method, "POST")
            await self._inference(exchange)
            return
        control = {
            "/health": self._health,
            "/ping": self._health,
            "/version": self._version,
            "/load": self._load,
            "/metrics": self._metrics,
            "/v1/models": self._models,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }.get(path)
        if control is None:
            raise detail(HTTPStatus.NOT_FOUND)
        if not (path == "/ping" and method == "POST"):
            _require(method, "POST" if path.endswith("tokenize") else "GET")
        self._observer.probes[path] += 1
        await control(exchange)

    def _inference_paths(self) -> Mapping[str, object]:
        return _GENERATING if self._task == "generate" else _POOLING[self._task]

    def _headers(self, exchange: Exchange) -> list[tuple[str, str]]:
        headers = [("vary", "Origin")]
        if self._request_id_headers:
            headers.append(("x-request-id", exchange.request.header("x-request-id") or uuid.uuid4().hex))
        return headers

    async def _json(self, exchange: Exchange, payload: Any) -> None:
        await exchange.answer(200, dump(payload), headers=self._headers(exchange))

    async def _health(self, exchange: Exchange) -> None:
        status = 500 if "health_500" in self._faults else 200
        await exchange.answer(status, b"", headers=self._headers(exchange))

    async def _version(self, exchange: Exchange) -> None:
        await self._json(exchange, {"version": VERSION})

    async def _load(self, exchange: Exchange) -> None:
        load = self.counts.open if self._server_load_tracking else 0
        await self._json(exchange, {"server_load": load})

    async def _models(self, exchange: Exchange) -> None:
        created = int(time.time())
        permission = {
            "id": f"modelperm-{secrets.token_hex(8)}",
            "object": "model_permission",
            "created": created,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        card = {
            "id": self.model,
            "object": "model",
            "created": created,
            "owned_by": "vllm",
            "root": "/checkpoints/fake",
            "parent": None,
            "max_model_len": self._max_model_len,
            "permission": [permission],
        }
        await self._json(exchange, {"object": "list", "data": [card]})

    async def _tokenize(self, exchange: Exchange) -> None:
        body = read_json(exchange.request.body)
        if "messages" in body:
            parts = chat_pieces((turn.get("role", "user"), str(turn.get("content", ""))) for turn in body["messages"])
        else:
            parts = pieces(str(body.get("prompt", "")))
        strings = parts if body.get("return_token_strs") else None
        ids = self._vocabulary.encode(parts)
        answer = {"count": len(ids), "max_model_len": self._max_model_len, "tokens": ids, "token_strs": strings}
        await self._json(exchange, answer)

    async def _detokenize(self, exchange: Exchange) -> None:
        body = read_json(exchange.request.body)
        await self._json(exchange, {"prompt": "".join(self._vocabulary.decode(body.get("tokens", [])))})

    # metrics

    async def _metrics(self, exchange: Exchange) -> None:
        kind = self._faults.by_name.get("metrics_garbage", None)
        if kind is None or kind in ("nan", "negative"):
            odd = {"nan": float("nan"), "negative": -1.0}.get(kind or "")
            await exchange.answer(200, render(self.model, self._readings(odd), self._statistics), CONTENT_TYPE)
        elif kind == "500":
            await exchange.answer(500, b"Internal Server Error", "text/plain; charset=utf-8")
        elif kind in ("huge", "endless"):
            await self._flood(exchange, None if kind == "endless" else 100 * 1024 * 1024)
        else:
            await exchange.answer(200, b"<html>{{{ \xff\xfe not metrics", CONTENT_TYPE)

    def _readings(self, odd: float | None) -> Readings:
        engine, full = self._engine, "kv_full" in self._faults or self._engine.starved > 0
        usage = 1.0 if full else min(1.0, engine.kv_tokens / (BLOCKS * BLOCK_SIZE))
        return Readings(
            running=engine.running if odd is None else odd,
            waiting=engine.waiting if odd is None else odd,
            kv_usage=usage if odd is None else odd,
            preemptions=engine.preemptions,
            prefix_queries=engine.cache.queries,
            prefix_hits=engine.cache.hits,
            block_size=BLOCK_SIZE,
            blocks=BLOCKS,
        )

    async def _flood(self, exchange: Exchange, size: int | None) -> None:
        await exchange.open_stream(CONTENT_TYPE)
        line, sent = b"# " + b"x" * 65_533 + b"\n", 0
        while not exchange.client_left and (size is None or sent < size):
            await exchange.chunk(line)
            await asyncio.sleep(0)
            sent += len(line)
        await exchange.end()

    # inference

    async def _inference(self, exchange: Exchange) -> None:
        received = self._observer.begin(exchange.request)
        outcome = "broken"
        try:
            await self._infer(exchange)
            outcome = "finished"
        except Refusal:
            outcome = "finished"
            raise
        except Cut:
            pass
        except asyncio.CancelledError:
            outcome = "aborted" if exchange.client_left and self._server.listening else "broken"
            raise
        finally:
            self._observer.end(received, outcome)

    async def _infer(self, exchange: Exchange) -> None:
        body, faults = self._read(exchange)
        exchange.ignores_abort = "ignore_abort" in faults
        await self._instead(exchange, faults)
        path = exchange.request.path
        if self._task != "generate":
            await self._pool(exchange, body, path, faults)
            return
        kind = _GENERATING[path]
        job = parse_job(kind, body, self.model, self._max_model_len, self._vocabulary)
        self._check_model(job.model)
        self._check_room()
        async with AsyncExitStack() as stack:
            if "kv_full" in faults:
                await stack.enter_async_context(self._engine.starving())
                await self._hang()
            await self._generate(exchange, job, faults)

    def _read(self, exchange: Exchange) -> tuple[Body, Faults]:
        """The body, and the faults that it, its model name or the worker asks for. Raises Refusal."""
        standing = self._use_fault()
        body = read_json(exchange.request.body)
        wanted = body.get("x_fault") or str(body.get("model") or self.model).partition("!")[2]
        try:
            faults = parse_faults(str(wanted)) if wanted else standing
        except ValueError as error:
            raise bad_request(str(error), "x_fault") from None
        if QUERY_OF_DEATH.encode() in exchange.request.body:
            faults = parse_faults(QUERY_OF_DEATH)
        return body, faults

    def _use_fault(self) -> Faults:
        faults = self._faults
        if self._fault_uses is not None:
            self._fault_uses -= 1
            if self._fault_uses <= 0:
                self._faults, self._fault_uses = Faults(), None
        return faults

    async def _instead(self, exchange: Exchange, faults: Faults) -> None:
        """Answer in place of the model, or not at all, where the fault says so. Raises Cut or Refusal."""
        if "die_before_byte" in faults:
            exchange.close()
            raise Cut
        if "kill_me_prompt" in faults:
            self._kill()
            raise Cut
        if "garbage" in faults:
            await exchange.raw(b"\x00\x16\x03\x01 not http at all \xff\xfe\r\n\r\n" + secrets.token_bytes(64))
            exchange.close()
            raise Cut
        if "html200" in faults:
            page = b"<!doctype html><html><body><h1>It works!</h1></body></html>"
            await exchange.answer(200, page, "text/html; charset=utf-8")
            raise Cut
        for name, answer in _ERRORS.items():
            if name in faults:
                raise refusal(*answer)
        if "429" in faults:
            after = ("retry-after", f"{faults.number('429', 1):g}")
            error = refusal(429, "Too many requests", HTTPStatus.TOO_MANY_REQUESTS.phrase)
            raise Refusal(429, error.body, (after,))

    def _check_model(self, name: str) -> None:
        if name.partition("!")[0] != self.model.partition("!")[0]:
            message = f"The model `{name}` does not exist. Valid aliases: {self.model}."
            raise refusal(HTTPStatus.NOT_FOUND, message, "NotFoundError", "model")

    def _check_room(self) -> None:
        limit = self._max_num_queued_reqs
        if limit is not None and self._engine.running + self._engine.waiting >= limit:
            raise refusal(*_ERRORS["busy_503"])

    async def _hang(self) -> None:
        await self._stuck.wait()

    async def _pool(self, exchange: Exchange, body: Body, path: str, faults: Faults) -> None:
        self._check_model(body.get("model") or self.model)
        if "hang_before" in faults or "health_ok_engine_dead" in faults:
            await self._hang()
        payload = _POOLING[self._task][path](body, secrets.token_hex(8), int(time.time()), self.model)
        await send_body(exchange, 200, dump(payload), self._headers(exchange), faults, self._hang)

    async def _generate(self, exchange: Exchange, job: Job, faults: Faults) -> None:
        begun, timing = time.monotonic(), self._timing_of(job, faults)
        stream = EventStream(exchange, faults, self._hang) if job.stream else None
        silent = "hang_before" in faults or "health_ok_engine_dead" in faults
        if stream is not None and not silent:
            await stream.open(self._headers(exchange))
        async with self._engine.admitted(job.sequences):
            queued = time.monotonic() - begun
            if silent:
                await self._hang()
                if stream is not None:
                    await stream.open(self._headers(exchange))
            draft = self._draft(exchange, job, faults)
            with self._engine.holding(job.prompt_tokens):
                await self._engine.prefill(job.prompt_tokens - draft.cached, timing)
                first = await self._speak(exchange, draft, faults, timing, stream)
        self._account(draft, queued, first - begun, time.monotonic() - begun)
        if stream is not None:
            await stream.finish(done=job.kind in ("chat", "completion"))
        else:
            body = dump(_BODIES[job.kind](draft))
            await send_body(exchange, 200, body, self._headers(exchange), faults, self._hang)

    def _timing_of(self, job: Job, faults: Faults) -> Timing:
        timing, own = self.timing, job.body.get("x_timing")
        if own is not None:
            known = {field.name for field in fields(Timing)}
            if not isinstance(own, dict) or not set(own) <= known:
                raise bad_request(f"x_timing takes {', '.join(sorted(known))}", "x_timing")
            timing = Timing(**own)
        return timing.slowed(faults.number("slow", 10)) if "slow" in faults else timing

    def _draft(self, exchange: Exchange, job: Job, faults: Faults) -> Draft:
        given = exchange.request.header("x-request-id")
        return Draft(
            job=job,
            choices=generate(job, multibyte="split_utf8" in faults),
            identity=_ID_PREFIX[job.kind] + (given or secrets.token_hex(8)),
            created=int(time.time()),
            model=self.model,
            cached=sum(self._engine.cache.admit(prompt) for prompt in job.prompt_ids),
            block_size=BLOCK_SIZE,
            prompt_tokens_details=self._prompt_tokens_details,
            vocabulary=self._vocabulary,
        )

    async def _speak(
        self, exchange: Exchange, draft: Draft, faults: Faults, timing: Timing, stream: EventStream | None
    ) -> float:
        """Run the engine's steps and, for a stream, send each event at its step. Returns the first token's time."""
        first, done = time.monotonic(), 0
        for step, name, payload in _events(draft):
            while done < step:
                await self._engine.step(timing)
                done += 1
                self._statistics.generation_tokens += sum(done <= len(choice.tokens) for choice in draft.choices)
                first = time.monotonic() if done == 1 else first
            if stream is not None:
                await stream.send(dump(payload), name)
        return first

    def _account(self, draft: Draft, queued: float, ttft: float, whole: float) -> None:
        statistics = self._statistics
        statistics.prompt_tokens += draft.job.prompt_tokens
        for choice in draft.choices:
            reason = "length" if choice.finish_reason == "length" else "stop"
            statistics.finished[reason] += 1
        observed = {
            "time_to_first_token_seconds": ttft,
            "e2e_request_latency_seconds": whole,
            "request_queue_time_seconds": queued,
            "request_prompt_tokens": draft.job.prompt_tokens,
            "request_generation_tokens": draft.generated,
        }
        for name, value in observed.items():
            statistics.histograms[name].observe(value)


_BUSY = (
    "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
)
_ERRORS = {
    "fast_500": (
        500,
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "InternalServerError",
    ),
    "busy_503": (503, _BUSY, "Service Unavailable"),
    "draining_500": (500, "cannot schedule new futures after shutdown", "InternalServerError"),
}


def _require(method: str, allowed: str) -> None:
    if method != allowed:
        raise detail(HTTPStatus.METHOD_NOT_ALLOWED, (("allow", allowed),))


def _events(draft: Draft) -> Iterator[tuple[int, str | None, dict[str, Any]]]:
    """(step, event name, payload) of a stream; a plain answer takes the same steps."""
    if draft.job.kind == "responses":
        yield from dialects.responses_events(draft)
    elif draft.job.kind == "messages":
        yield from dialects.messages_events(draft)
    else:
        for step, payload in chunks(draft):
            yield step, None, payload


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
        task=options.task,
        fault=options.fault,
        timing=Timing(**{field.name: getattr(options, field.name) for field in fields(Timing)}),
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        prompt_tokens_details=options.prompt_tokens_details,
    )
    worker.dies_by(lambda: os.kill(os.getpid(), signal.SIGKILL))
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
