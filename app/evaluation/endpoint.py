"""What is measured over HTTP: a worker or a gateway that speaks OpenAI's completions."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from app.card import Speed
from app.errors import LaunchError
from app.evaluation.resampling import shortened
from app.evaluation.tasks import ANSWER_TOKENS, STOP, Item
from app.uncertainty import TOP_LOGPROBS

TIMEOUT = httpx.Timeout(300, connect=10)
CONCURRENCY = 8
SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Whom to ask: `base_url` ends in /v1, `model` is what it calls the variant."""

    base_url: str
    model: str
    api_key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion, and the log-probabilities of each token's alternatives."""

    text: str
    alternatives: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Streamed:
    """When a stream was asked for and when each of its chunks with text came, in seconds; tokens by its usage."""

    started: float
    chunks: tuple[float, ...]
    tokens: int


class Client:
    """Asks an endpoint. Every failure is a LaunchError that says what the endpoint said."""

    def __init__(self, http: httpx.AsyncClient, endpoint: Endpoint) -> None:
        self._http = http
        self._model = endpoint.model

    @classmethod
    @asynccontextmanager
    async def of(cls, endpoint: Endpoint) -> AsyncIterator[Client]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=endpoint.base_url, headers=endpoint.headers, timeout=TIMEOUT, limits=limits, trust_env=False
        ) as http:
            yield cls(http, endpoint)

    async def answers(self, items: Sequence[Item], on_answer: Callable[[int], None]) -> list[Answer]:
        """Greedy answers in the items' order, CONCURRENCY at a time; `on_answer` hears how many there are."""
        gate, done = asyncio.Semaphore(CONCURRENCY), 0

        async def ask(item: Item) -> Answer:
            nonlocal done
            async with gate:
                answer = await self._answer(item)
            done += 1
            on_answer(done)
            return answer

        async with _all_or_none() as group:
            tasks = [group.create_task(ask(item)) for item in items]
        return [task.result() for task in tasks]

    async def speed(self, streams: int, prompts: Sequence[str], tokens: int) -> Speed:
        """`streams` at a time until all `prompts` are answered with `tokens` tokens each."""
        waiting = iter(prompts)
        measured: list[Streamed] = []

        async def lane() -> None:
            measured.extend([await self._stream(prompt, tokens) for prompt in waiting])

        started = time.perf_counter()
        async with _all_or_none() as group:
            for _ in range(streams):
                group.create_task(lane())
        return summary(streams, measured, time.perf_counter() - started)

    async def _answer(self, item: Item) -> Answer:
        body = self._body(item.prompt, ANSWER_TOKENS) | {"stop": [STOP], "logprobs": TOP_LOGPROBS}
        with _told():
            response = await self._http.post("completions", json=body)
            _check(response.status_code, response.text)
            return read_answer(response.json())

    async def _stream(self, prompt: str, tokens: int) -> Streamed:
        body = self._body(prompt, tokens) | {
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        chunks: list[float] = []
        generated, started = 0, time.perf_counter()
        with _told():
            async with self._http.stream("POST", "completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    _check(response.status_code, (await response.aread()).decode("utf-8", "replace"))
                async for line in response.aiter_lines():
                    event = _event(line)
                    if event.get("choices"):
                        chunks.append(time.perf_counter())
                    generated = (event.get("usage") or {}).get("completion_tokens", generated)
        return Streamed(started, tuple(chunks), generated)

    def _body(self, prompt: str, tokens: int) -> dict[str, Any]:
        return {"model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}


def summary(streams: int, measured: Sequence[Streamed], wall_s: float) -> Speed:
    """Pure. Raises LaunchError when nothing came."""
    firsts = [stream.chunks[0] - stream.started for stream in measured if stream.chunks]
    gaps = [
        later - earlier for stream in measured for earlier, later in zip(stream.chunks, stream.chunks[1:], strict=False)
    ]
    if not (firsts and gaps):
        raise LaunchError("the endpoint streamed nothing")
    return Speed(
        streams=streams,
        ttft_p50_s=shortened(statistics.median(firsts)),
        itl_p50_s=shortened(statistics.median(gaps)),
        tokens_per_s=shortened(sum(stream.tokens for stream in measured) / wall_s),
    )


def read_answer(body: Any) -> Answer:
    """A completion as OpenAI's API gives it: `logprobs.top_logprobs` has a mapping of token to log-probability each."""
    choice = body["choices"][0]
    listed = (choice.get("logprobs") or {}).get("top_logprobs") or []
    return Answer(choice["text"], tuple(tuple((token or {}).values()) for token in listed))


def _event(line: str) -> dict[str, Any]:
    """The object of one line of a stream; empty for lines that carry none. Raises LaunchError for an error in it."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return {}
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise LaunchError(f"the endpoint broke off: {_message(event)}")
    return event


def _check(status: int, text: str) -> None:
    if status != httpx.codes.OK:
        try:
            said = _message(json.loads(text))
        except ValueError:
            said = text[:SHOWN_CHARS]
        raise LaunchError(f"the endpoint answered {status}: {said}")


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:SHOWN_CHARS]


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong on the way, and what cannot be read, as a LaunchError."""
    try:
        yield
    except httpx.TimeoutException:
        raise LaunchError("the endpoint did not answer in time") from None
    except httpx.HTTPError as error:
        raise LaunchError(f"the endpoint cannot be reached: {str(error) or type(error).__name__}") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise LaunchError("the endpoint answered with what is no completion") from None


@asynccontextmanager
async def _all_or_none() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first failure is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
