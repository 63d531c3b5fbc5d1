"""The routes of a fake worker that generate, embed or score: one request from its body to its last byte."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from http import HTTPStatus
from typing import Any

from tests.fakes import dialects, pooling
from tests.fakes.answers import Draft, chat_body, chunks, completion_body
from tests.fakes.delivery import Cut, EventStream, dump, send_body
from tests.fakes.engine import Timing
from tests.fakes.faults import Faults, parse_faults
from tests.fakes.generation import generate
from tests.fakes.parsing import Job, check_engine, parse_job, read_json
from tests.fakes.refusals import Body, Refusal, bad_request, refusal
from tests.fakes.server import Exchange
from tests.fakes.state import BLOCK_SIZE, State

QUERY_OF_DEATH = "kill_me_prompt"

GENERATING = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
POOLING: Mapping[str, Mapping[str, Callable[[Body, str, int, str], dict[str, Any]]]] = {
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
_BUSY = (
    "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
)
_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
_ERRORS = {
    "fast_500": (500, _DEAD, "InternalServerError"),
    "busy_503": (503, _BUSY, "Service Unavailable"),
    "draining_500": (500, "cannot schedule new futures after shutdown", "InternalServerError"),
}
_SILENT = ("hang_before", "health_ok_engine_dead")


class Inference:
    """Inference routes over a worker's state; `kill` is what a query of death does."""

    def __init__(self, state: State, kill: Callable[[], None]) -> None:
        self._state = state
        self._kill = kill
        self.paths = frozenset(GENERATING if state.options.task == "generate" else POOLING[state.options.task])

    async def serve(self, exchange: Exchange) -> None:
        """Answer one request and count how it ended. Raises Refusal."""
        received = self._state.observer.begin(exchange.request)
        outcome = "broken"
        try:
            await self._serve(exchange)
            outcome = "finished"
        except Refusal:
            outcome = "finished"
            raise
        except Cut:
            pass
        except asyncio.CancelledError:
            outcome = "aborted" if exchange.client_left else "broken"
            raise
        finally:
            self._state.observer.end(received, outcome)

    async def _serve(self, exchange: Exchange) -> None:
        body, faults = self._read(exchange)
        exchange.ignores_abort = "ignore_abort" in faults
        await self._instead(exchange, faults)
        kind = GENERATING.get(exchange.request.path)
        if kind is None:
            await self._pool(exchange, body, faults)
            return
        try:
            job = parse_job(kind, body, self._state.model, self._state.options.max_model_len, self._state.vocabulary)
            self._state.check_model(job.model)
            self._check_room()
        except Refusal as error:
            # Anthropic's shape is for what vLLM's own code refuses; validation errors come before it.
            if kind == "messages" and error.body["error"]["type"] != HTTPStatus.BAD_REQUEST.phrase:
                raise Refusal(error.status, dialects.messages_error(error.body)) from None
            raise
        if "kv_full" in faults:
            with self._state.engine.starving():
                await self._state.hang()
        await self._generate(exchange, job, faults)

    def _read(self, exchange: Exchange) -> tuple[Body, Faults]:
        """The body, and the faults that it, its model's name or the worker asks for. Raises Refusal."""
        standing = self._state.use_faults()
        body = read_json(exchange.request.body, exchange.request.header("content-type"))
        noted = body.get("metadata") if isinstance(body.get("metadata"), dict) else {}
        wanted = body.get("x_fault") or (noted or {}).get("x_fault")
        wanted = wanted or str(body.get("model") or self._state.model).partition("!")[2]
        if QUERY_OF_DEATH.encode() in exchange.request.body:
            wanted = QUERY_OF_DEATH
        try:
            return body, parse_faults(str(wanted)) if wanted else standing
        except ValueError as error:
            raise bad_request(str(error), "x_fault") from None

    async def _instead(self, exchange: Exchange, faults: Faults) -> None:
        """Answer in place of the model, or not at all, where the fault says so. Raises Cut or Refusal."""
        if "kill_me_prompt" in faults:
            self._kill()
            raise Cut
        if "garbage" in faults:
            await exchange.raw(b"\x00\x16\x03\x01 not http at all \xff\xfe\r\n\r\n")
        if "garbage" in faults or "die_before_byte" in faults:
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
            error = refusal(429, "Too many requests", HTTPStatus.TOO_MANY_REQUESTS.phrase)
            raise Refusal(429, error.body, (("retry-after", f"{faults.number('429', 1):g}"),))

    def _check_room(self) -> None:
        limit, engine = self._state.options.max_num_queued_reqs, self._state.engine
        if limit is not None and engine.running + engine.waiting >= limit:
            raise refusal(*_ERRORS["busy_503"])

    async def _pool(self, exchange: Exchange, body: Body, faults: Faults) -> None:
        state = self._state
        state.check_model(body.get("model") or state.model)
        if any(name in faults for name in _SILENT):
            await state.hang()
        answer = POOLING[state.options.task][exchange.request.path]
        payload = answer(body, secrets.token_hex(8), int(time.time()), state.model)
        await send_body(exchange, 200, dump(payload), state.headers(exchange), faults, state.hang)

    async def _generate(self, exchange: Exchange, job: Job, faults: Faults) -> None:
        state, silent = self._state, any(name in faults for name in _SILENT)
        timing, headers = self._timing(job, faults), state.headers(exchange)
        stream = EventStream(exchange, faults, state.hang, headers) if job.stream else None
        if stream is not None and not silent:
            # As in vLLM the headers leave before the request has a slot in the engine.
            await stream.open()
        if await _refused(exchange, job, stream):
            return
        begun = time.monotonic()
        async with state.engine.admitted(job.sequences):
            admitted = time.monotonic()
            if silent:
                await state.hang()
            if stream is not None:
                await stream.open()
            draft = self._draft(exchange, job, faults)
            with state.engine.holding(job.prompt_tokens):
                await state.engine.prefill(job.prompt_tokens - draft.cached, timing)
                first = await self._speak(draft, timing, stream)
        queued, ttft, whole = admitted - begun, first - begun, time.monotonic() - begun
        reasons = [choice.finish_reason for choice in draft.choices]
        state.statistics.account(job.prompt_tokens, draft.generated, reasons, queued, ttft, whole)
        if stream is not None:
            await stream.finish(done=job.kind in ("chat", "completion"))
        else:
            await send_body(exchange, 200, dump(_BODIES[job.kind](draft)), headers, faults, state.hang)

    def _timing(self, job: Job, faults: Faults) -> Timing:
        timing, own = self._state.timing, job.body.get("x_timing")
        if own is not None:
            known = {field.name for field in fields(Timing)}
            if not isinstance(own, dict) or not set(own) <= known:
                raise bad_request(f"x_timing takes {', '.join(sorted(known))}", "x_timing")
            timing = Timing(**own)
        return timing.slowed(faults.number("slow", 10)) if "slow" in faults else timing

    def _draft(self, exchange: Exchange, job: Job, faults: Faults) -> Draft:
        state, given = self._state, exchange.request.header("x-request-id")
        return Draft(
            job=job,
            choices=generate(job, multibyte="split_utf8" in faults),
            identity=_ID_PREFIX[job.kind] + (given or secrets.token_hex(8)),
            created=int(time.time()),
            model=state.model,
            cached=sum(state.engine.cache.admit(prompt, job.body.get("cache_salt")) for prompt in job.prompt_ids),
            block_size=BLOCK_SIZE,
            prompt_tokens_details=state.options.prompt_tokens_details,
            vocabulary=state.vocabulary,
        )

    async def _speak(self, draft: Draft, timing: Timing, stream: EventStream | None) -> float:
        """Run the engine's steps and, for a stream, send each event at its step. Returns the first token's time."""
        first, done, engine = time.monotonic(), 0, self._state.engine
        for step, name, payload in _events(draft):
            while done < step:
                await engine.step(timing)
                done += 1
                self._state.statistics.generation_tokens += sum(done <= len(choice.tokens) for choice in draft.choices)
                first = time.monotonic() if done == 1 else first
            if stream is not None:
                await stream.send(dump(payload), name)
        return first


async def _refused(exchange: Exchange, job: Job, stream: EventStream | None) -> bool:
    """Whether the engine refuses: an event, when the stream has already begun. Raises Refusal or Cut."""
    try:
        check_engine(job)
    except Refusal as error:
        if stream is None:
            raise
        if job.kind not in ("chat", "completion"):
            # vLLM trips over its own error event here and leaves the stream unfinished.
            exchange.close()
            raise Cut from None
        await stream.fail(error.body)
        return True
    return False


def _events(draft: Draft) -> Iterator[tuple[int, str | None, dict[str, Any]]]:
    """(step, event name, payload) of a stream; a plain answer takes the same steps."""
    if draft.job.kind == "responses":
        yield from dialects.responses_events(draft)
    elif draft.job.kind == "messages":
        yield from dialects.messages_events(draft)
    else:
        for step, payload in chunks(draft):
            yield step, None, payload
