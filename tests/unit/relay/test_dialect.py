"""What events mean, on the recorded answers of a real vLLM."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from app.errors import WorkerLost
from app.inference import Route, TokenUsage
from app.relay.dialect import Meaning, dialect_of, usage_of_answer
from app.relay.sse import EventSplitter, data_of

WIRE = Path(__file__).parents[2] / "wire"


def body(name: str) -> bytes:
    return (WIRE / f"{name}.http").read_bytes().partition(b"\r\n\r\n")[2]


def meanings(name: str, route: Route) -> list[Meaning]:
    dialect = dialect_of(route)
    return [dialect.read(data_of(event)) for event in EventSplitter().feed(body(name))]


def test_the_chunk_with_only_the_role_carries_no_token() -> None:
    first, second, *_ = meanings("chat_stream_usage", Route.CHAT)
    assert not first.has_token
    assert second.has_token


def test_tokens_usage_and_end_of_a_chat_stream() -> None:
    read = meanings("chat_stream_usage", Route.CHAT)
    assert sum(meaning.has_token for meaning in read) == 7
    assert [meaning.usage for meaning in read if meaning.only_usage] == [TokenUsage(37, 8, 32)]
    assert [meaning.is_last for meaning in read] == [False] * (len(read) - 1) + [True]


def test_usage_in_every_chunk_is_not_a_chunk_of_only_usage() -> None:
    read = meanings("chat_stream_continuous_usage", Route.CHAT)
    with_usage = [meaning for meaning in read if meaning.usage]
    assert len(with_usage) > 2
    assert [meaning.only_usage for meaning in with_usage] == [False] * (len(with_usage) - 1) + [True]


@pytest.mark.parametrize("name", ["chat_tools_named_stream", "chat_tools_required_stream"])
def test_a_tool_call_is_generated(name: str) -> None:
    assert any(meaning.has_token for meaning in meanings(name, Route.CHAT))


def test_text_completions() -> None:
    read = meanings("completion_stream", Route.COMPLETIONS)
    assert any(meaning.has_token for meaning in read)
    assert read[-1].is_last


def test_responses_end_with_their_own_event() -> None:
    read = meanings("responses_stream", Route.RESPONSES)
    assert any(meaning.has_token for meaning in read)
    assert read[-1].is_last
    assert read[-1].usage is not None


@pytest.mark.parametrize(
    "data", [b"", b"not json", b"[]", b'{"choices": 7}', b'{"choices":[{"delta":{"content":1}}]}', b"\xff"]
)
def test_what_is_not_understood_means_nothing(data: bytes) -> None:
    assert dialect_of(Route.CHAT).read(data) == Meaning()


def test_an_error_inside_a_stream_is_seen() -> None:
    assert dialect_of(Route.CHAT).read(b'{"error": {"message": "x"}}').is_error


@pytest.mark.parametrize("route", [Route.CHAT, Route.RESPONSES, Route.MESSAGES])
def test_our_own_error_event_carries_the_error_object(route: Route) -> None:
    event = dialect_of(route).error_event(WorkerLost("gone"))
    told = msgspec.json.decode(data_of(event))
    assert told["error"]["code"] == "worker_lost"
    assert event.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("chat", TokenUsage(37, 8, 32)),
        ("responses", TokenUsage(37, 8, 32)),
        ("anthropic_messages", TokenUsage(5, 8, 32)),
        ("tokenize_prompt", None),
    ],
)
def test_usage_of_whole_answers(name: str, usage: TokenUsage | None) -> None:
    assert usage_of_answer(body(name)) == usage


def test_an_answer_that_is_not_json_is_an_error() -> None:
    with pytest.raises(msgspec.DecodeError):
        usage_of_answer(b'{"id": "chatcmpl-1", "choices": [')
