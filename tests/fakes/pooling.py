"""The answers of a worker that serves an embedding or a scoring model. Vectors and scores are made up, but stable."""

from __future__ import annotations

import math
import zlib
from typing import Any

from tests.fakes.refusals import Body, bad_request
from tests.fakes.vocabulary import pieces

Json = dict[str, Any]
DIMENSIONS = 8


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return list(value)
    raise bad_request("Input should be a string or a list of strings")


def _usage(texts: list[str]) -> Json:
    tokens = sum(len(pieces(text)) for text in texts)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}


def embedding(text: str) -> list[float]:
    """A unit vector that depends on the text alone."""
    raw = [(zlib.crc32(f"{axis}:{text}".encode()) % 2001 - 1000) / 1000 or 0.001 for axis in range(DIMENSIONS)]
    length = math.sqrt(sum(value * value for value in raw))
    return [value / length for value in raw]


def embeddings_body(body: Body, identity: str, created: int, model: str) -> Json:
    texts = _texts(body.get("input"))
    data = [{"index": at, "object": "embedding", "embedding": embedding(text)} for at, text in enumerate(texts)]
    return {
        "id": f"embd-{identity}",
        "object": "list",
        "created": created,
        "model": model,
        "data": data,
        "usage": _usage(texts),
    }


def similarity(left: str, right: str) -> float:
    """Between 0 and 1; 1 for equal texts."""
    cosine = sum(a * b for a, b in zip(embedding(left), embedding(right), strict=True))
    return (cosine + 1) / 2


def score_body(body: Body, identity: str, created: int, model: str) -> Json:
    first, seconds = _texts(body.get("text_1")), _texts(body.get("text_2"))
    firsts = first * len(seconds) if len(first) == 1 else first
    pairs = zip(firsts, seconds, strict=False)
    data = [{"index": at, "object": "score", "score": similarity(*pair)} for at, pair in enumerate(pairs)]
    return {
        "id": f"score-{identity}",
        "object": "list",
        "created": created,
        "model": model,
        "data": data,
        "usage": _usage(first + seconds),
    }


def rerank_body(body: Body, identity: str, created: int, model: str) -> Json:
    del created  # a rerank answer carries no time
    query, documents = _texts(body.get("query"))[0], _texts(body.get("documents"))
    scored = sorted(
        ((similarity(query, text), at, text) for at, text in enumerate(documents)),
        key=lambda entry: (-entry[0], entry[1]),
    )
    results = [
        {"index": at, "document": {"text": text, "multi_modal": None}, "relevance_score": score}
        for score, at, text in scored[: body.get("top_n") or len(scored)]
    ]
    tokens = sum(len(pieces(text)) for text in [query, *documents])
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"id": f"rerank-{identity}", "model": model, "usage": usage, "results": results}
