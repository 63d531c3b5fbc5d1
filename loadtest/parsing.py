"""What reading a request body costs, by what is in it."""

import json
import time
from random import Random

from app.inference import InferenceRequest, Route

SIZE_BYTES = 1_000_000
REPEATS = 9


def bodies() -> dict[str, tuple[Route, bytes]]:
    """Bodies of about a megabyte, by name."""
    tokens = [Random(1).randrange(100, 50_000) for _ in range(SIZE_BYTES // 7)]
    said = "lorem ipsum dolor sit amet " * 20
    turns = [{"role": ("user", "assistant")[at % 2], "content": said} for at in range(SIZE_BYTES // 580)]
    return {
        "plain text": (Route.CHAT, _chat("word " * (SIZE_BYTES // 5))),
        "text of two-byte characters": (Route.CHAT, _chat("слово" * (SIZE_BYTES // 10), ensure_ascii=False)),
        "text, every character escaped": (Route.CHAT, _chat("é" * (SIZE_BYTES // 6))),
        "1,700 messages": (Route.CHAT, json.dumps({"model": "m", "messages": turns}).encode()),
        "token ids": (Route.COMPLETIONS, json.dumps({"model": "m", "prompt": tokens}).encode()),
    }


def _chat(text: str, *, ensure_ascii: bool = True) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    return json.dumps(body, ensure_ascii=ensure_ascii).encode()


def parsing_ms_per_mb(route: Route, body: bytes) -> float:
    """The least CPU time of several parses."""
    spent = []
    for _ in range(REPEATS):
        before = time.thread_time_ns()
        InferenceRequest.parse(body, request_id="r", route=route, arrived=0.0)
        spent.append(time.thread_time_ns() - before)
    return min(spent) / len(body)


def parsing_table() -> str:
    rows = [f"| {name} | {parsing_ms_per_mb(*body):.2f} |" for name, body in bodies().items()]
    return "\n".join(["| a megabyte of | ms/MB |", "| --- | ---: |", *rows])
