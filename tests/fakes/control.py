"""The routes of a fake worker that generate nothing: health, models, tokens, metrics."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from tests.fakes.delivery import dump
from tests.fakes.metrics_page import CONTENT_TYPE, Readings, render
from tests.fakes.parsing import read_json
from tests.fakes.refusals import missing
from tests.fakes.server import Exchange
from tests.fakes.state import BLOCK_SIZE, BLOCKS, State
from tests.fakes.vocabulary import chat_pieces, pieces

HUGE_PAGE = 100 * 1024 * 1024
Route = tuple[tuple[str, ...], Callable[[Exchange], Awaitable[None]]]


class Control:
    """Control routes over a worker's state; `routes` maps a path to its methods and handler."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.routes: Mapping[str, Route] = {
            "/health": (("GET",), self._health),
            "/ping": (("GET", "POST"), self._health),
            "/version": (("GET",), self._version),
            "/load": (("GET",), self._load),
            "/metrics": (("GET",), self._metrics),
            "/v1/models": (("GET",), self._models),
            "/tokenize": (("POST",), self._tokenize),
            "/detokenize": (("POST",), self._detokenize),
        }

    async def _answer(self, exchange: Exchange, payload: Any) -> None:
        await exchange.answer(200, dump(payload), headers=self._state.headers(exchange))

    async def _health(self, exchange: Exchange) -> None:
        status = 500 if "health_500" in self._state.faults else 200
        await exchange.answer(status, b"", headers=self._state.headers(exchange))

    async def _version(self, exchange: Exchange) -> None:
        await self._answer(exchange, {"version": self._state.options.version})

    async def _load(self, exchange: Exchange) -> None:
        tracked = self._state.options.server_load_tracking
        await self._answer(exchange, {"server_load": self._state.observer.counts.open if tracked else 0})

    async def _models(self, exchange: Exchange) -> None:
        card = model_card(self._state.model, self._state.options.max_model_len, int(time.time()))
        await self._answer(exchange, {"object": "list", "data": [card]})

    async def _tokenize(self, exchange: Exchange) -> None:
        state, body = self._state, read_json(exchange.request.body, exchange.request.header("content-type"))
        if "messages" in body:
            parts = chat_pieces((turn.get("role", "user"), str(turn.get("content", ""))) for turn in body["messages"])
        elif "prompt" in body:
            parts = pieces(str(body["prompt"]))
        else:
            raise missing(body, "prompt", "messages")
        state.check_model(body.get("model") or state.model)
        # A byte-level tokenizer spells the space before a word so.
        strings = [part.replace(" ", "Ġ") for part in parts] if body.get("return_token_strs") else None
        ids, length = state.vocabulary.encode(parts), state.options.max_model_len
        await self._answer(exchange, {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": strings})

    async def _detokenize(self, exchange: Exchange) -> None:
        body = read_json(exchange.request.body, exchange.request.header("content-type"))
        if "tokens" not in body:
            raise missing(body, "tokens")
        await self._answer(exchange, {"prompt": "".join(self._state.vocabulary.decode(body["tokens"]))})

    async def _metrics(self, exchange: Exchange) -> None:
        kind = self._state.faults.by_name.get("metrics_garbage")
        if kind in (None, "nan", "negative"):
            page = render(self._state.model, self._readings(kind), self._state.statistics)
            await exchange.answer(200, page, CONTENT_TYPE, self._state.headers(exchange))
        elif kind == "500":
            await exchange.answer(500, b"Internal Server Error", "text/plain; charset=utf-8")
        elif kind in ("huge", "endless"):
            await _flood(exchange, HUGE_PAGE if kind == "huge" else None)
        else:
            await exchange.answer(200, b"<html>{{{ \xff\xfe not metrics", CONTENT_TYPE)

    def _readings(self, kind: str | None) -> Readings:
        engine = self._state.engine
        odd = {"nan": float("nan"), "negative": -1.0}.get(kind or "")
        full = "kv_full" in self._state.faults or engine.starved > 0
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


async def _flood(exchange: Exchange, size: int | None) -> None:
    """Comment lines up to a size, or until the client leaves."""
    await exchange.open_stream(CONTENT_TYPE)
    line, sent = b"# " + b"x" * 65_533 + b"\n", 0
    while not exchange.client_left and (size is None or sent < size):
        await exchange.chunk(line)
        await asyncio.sleep(0)
        sent += len(line)
    await exchange.end()


def model_card(model: str, max_model_len: int, created: int) -> dict[str, Any]:
    """One entry of /v1/models; `root` is where a real worker shows its checkpoint's path."""
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
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": "/checkpoints/fake",
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
