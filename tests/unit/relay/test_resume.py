"""What a client gets when its worker is lost, at every possible place, is what it would have got."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.errors import WorkerLost
from app.inference import InferenceRequest, Route
from app.relay.resumable import NotResumable, Terms, continuation, terms_of
from app.relay.sse import data_of
from app.relay.transcript import Transcript
from app.relay.translator import Translator
from tests.unit.relay.speaker import PROMPT, SPECIAL, Asked, Speaker

Json = dict[str, Any]
CONTEXT = 10_000


def request(route: Route = Route.CHAT, **fields: Any) -> InferenceRequest:
    body = {"model": "m", "stream": True, "temperature": 0, **fields}
    body.setdefault(*(("messages", [{"role": "user", "content": "a"}]) if route is Route.CHAT else ("prompt", "a")))
    return InferenceRequest.parse(json.dumps(body).encode(), request_id="r", route=route, arrived=0.0)


def asked_by(continued: InferenceRequest, chunks: tuple[int, ...]) -> Asked:
    """What the second worker reads in its body."""
    body = json.loads(continued.body_for("m"))
    stop = body.get("stop") or []
    return Asked(
        body["prompt"],
        body["max_tokens"],
        (stop,) if isinstance(stop, str) else tuple(stop),
        chunks,
        is_chat=False,
        shows_ids=body.get("return_token_ids", False),
    )


def seen(events: Iterable[bytes]) -> tuple[str, list[Json], Any]:
    """What a client makes of a stream: the text, the shapes of what carries it, and the usage."""
    text, shapes, usage = "", [], None
    for event in events:
        data = data_of(event)
        if data in (b"", b"[DONE]"):
            continue
        chunk = json.loads(data)
        usage = chunk.pop("usage", usage)
        for choice in chunk["choices"]:
            text += choice.pop("text", "") or choice.pop("delta", {}).get("content", "")
        if chunk not in shapes:
            shapes.append(chunk)
    return text, shapes, usage


class Stream:
    """A client's stream, over as many workers as it takes."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.transcript = Transcript(terms.held_chars, 100_000)
        self.translator = Translator(terms.request.route, self.transcript)
        self.got: list[bytes] = []

    def take(self, events: Iterable[bytes]) -> None:
        self.got += filter(None, map(self.translator.translate, events))

    def resume(self, chunks: tuple[int, ...]) -> Asked:
        continued = continuation(self.terms, self.transcript, CONTEXT, resumes_left=1)
        self.translator.go_on()
        return asked_by(continued, chunks)


texts = st.text(st.sampled_from("ab é漢🙂"), min_size=1, max_size=12)


@st.composite
def tokens(draw: st.DrawFn) -> list[bytes]:
    """Text cut anywhere into tokens, also inside characters, with special tokens in between."""
    data = draw(texts).encode()
    cuts = sorted(draw(st.sets(st.integers(1, len(data)), max_size=len(data))) | {len(data)})
    parts = [data[begin:end] for begin, end in zip([0, *cuts], cuts, strict=False)]
    for place in draw(st.lists(st.integers(0, len(parts)), max_size=2)):
        parts.insert(place, SPECIAL)
    return parts


sizes = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
stops = st.lists(st.text(st.sampled_from("ab é"), min_size=1, max_size=4), max_size=2)


@given(
    tokens(), stops, st.sampled_from([Route.CHAT, Route.COMPLETIONS]), sizes, sizes, st.integers(1, 30), st.booleans()
)
@example([b"a"] * 6, ["aab"], Route.CHAT, (1,), (1,), 30, False)
@example(["🙂".encode()[:1], "🙂".encode()[1:2], "🙂".encode()[2:], b"a"], [], Route.CHAT, (1,), (1,), 30, False)
def test_cut_anywhere_a_stream_goes_on_as_if_nothing_had_happened(
    said: list[bytes],
    stop: list[str],
    route: Route,
    first: tuple[int, ...],
    second: tuple[int, ...],
    most: int,
    twice: bool,
) -> None:
    speaker = Speaker(said)
    terms = terms_of(request(route, stop=stop, max_tokens=most))
    whole = Asked(PROMPT, most, tuple(stop), first, is_chat=route is Route.CHAT, shows_ids=True)
    text, shapes, usage = seen(speaker.events(replace(whole, shows_ids=False)))
    _, finer, _ = seen(speaker.events(replace(whole, shows_ids=False, chunks=(1,))))
    events = list(speaker.events(whole))
    for cut in range(1, len(events)):
        stream = Stream(terms)
        stream.take(events[:cut])
        is_begun = any(b'"token_ids":[1' in event for event in events[:cut])
        is_ended = any(b'"finish_reason":"' in event for event in events[:cut])
        if is_ended or not is_begun:
            with pytest.raises(NotResumable, match="finished" if is_ended else "nothing generated"):
                stream.resume(second)
            continue
        more = list(speaker.events(stream.resume(second), "other"))
        if twice and len(more) > 3:
            stream.take(more[:1])
            more = list(speaker.events(stream.resume(first), "third"))
        stream.take(more)
        got, got_shapes, got_usage = seen(stream.got)
        assert (got, got_usage) == (text, usage)
        assert got_shapes[-2:] == shapes[-2:]
        assert all(shape in [*shapes, *finer] for shape in got_shapes)
        assert stream.got[-1] == b"data: [DONE]\n\n"
        assert not any(b'"token_ids":[' in event for event in stream.got)


@given(tokens(), sizes)
def test_a_stream_that_does_not_break_is_what_it_is_without_token_ids(
    said: list[bytes], chunks: tuple[int, ...]
) -> None:
    for is_chat in (True, False):
        stream = Stream(terms_of(request(Route.CHAT if is_chat else Route.COMPLETIONS)))
        asked = Asked(PROMPT, 99, (), chunks, is_chat=is_chat, shows_ids=True)
        stream.take(Speaker(said).events(asked))
        assert stream.got == list(Speaker(said).events(replace(asked, shows_ids=False)))


def broken(said: list[bytes], cut: int, **fields: Any) -> Stream:
    stream = Stream(terms_of(request(**fields)))
    stream.take(list(Speaker(said).events(Asked(PROMPT, 99)))[:cut])
    return stream


def test_a_seam_is_never_inside_a_character() -> None:
    smile = "🙂".encode()
    stream = broken([b"a", smile[:2], smile[2:], b"b"], 3)
    assert stream.resume((1,)).prompt == [*PROMPT, 1000]


def test_another_text_than_the_one_that_was_begun_is_not_gone_on_with() -> None:
    stream = Stream(terms_of(request()))
    stream.take(list(Speaker([b"one", b" two", b" three"]).events(Asked(PROMPT, 99, chunks=(2,))))[:2])
    asked = stream.resume((1,))
    assert asked.prompt == [*PROMPT]
    with pytest.raises(WorkerLost, match="the same answer"):
        stream.take(Speaker([b"one", b" too"]).events(asked))
    assert seen(stream.got)[0] == "one two"


def test_an_answer_that_ends_before_it_has_caught_up_has_diverged() -> None:
    stream = Stream(terms_of(request()))
    stream.take(list(Speaker([b"one", b" two", b" three"]).events(Asked(PROMPT, 99, chunks=(2,))))[:2])
    with pytest.raises(WorkerLost, match="the same answer"):
        stream.take(Speaker([b"one"]).events(stream.resume((1,))))


def test_sampled_text_is_continued_only_where_nothing_is_generated_twice() -> None:
    fields: Json = {"temperature": 0.7}
    assert broken([b"one", b" two", b" three"], 3, **fields).resume((1,)).prompt == [*PROMPT, 1000, 1001]
    stream = Stream(terms_of(request(**fields)))
    stream.take(list(Speaker([b"one", b" two", b" three"]).events(Asked(PROMPT, 99, chunks=(2,))))[:2])
    with pytest.raises(NotResumable, match="without a seam"):
        stream.resume((1,))


def test_usage_of_every_chunk_is_that_of_the_whole() -> None:
    stream = broken([b"a", b"b", b"c"], 3)
    stream.resume((1,))
    usage = {
        "prompt_tokens": 5,
        "total_tokens": 6,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    choice = {"index": 0, "text": "c", "finish_reason": None, "token_ids": [1002]}
    [told] = [stream.translator.translate(b"data: %b\n\n" % msgspec.json.encode({"choices": [choice], "usage": usage}))]
    assert json.loads(data_of(told))["usage"] == {
        "prompt_tokens": 3,
        "total_tokens": 6,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


@pytest.mark.parametrize(
    "delta", [{"reasoning": "hm"}, {"reasoning_content": "hm"}, {"tool_calls": [{}]}, {"refusal": "no"}]
)
def test_what_is_not_plain_text_is_not_resumable(delta: Json) -> None:
    stream = broken([b"a", b"b"], 2)
    event = msgspec.json.encode({"choices": [{"index": 0, "delta": delta, "token_ids": [1]}]})
    stream.take([b"data: %b\n\n" % event])
    with pytest.raises(NotResumable, match="not plain text"):
        stream.resume((1,))


def test_a_worker_that_gives_no_token_ids_is_not_resumable() -> None:
    stream = Stream(terms_of(request()))
    events = list(Speaker([b"a", b"b"]).events(Asked(PROMPT, 99, shows_ids=False)))
    stream.take(events[:2])
    assert stream.got == events[:2]
    with pytest.raises(NotResumable, match="no token ids"):
        stream.resume((1,))


def test_a_dying_engine_is_a_lost_worker_and_a_refusal_is_not() -> None:
    stream = broken([b"a", b"b"], 2)
    with pytest.raises(WorkerLost):
        stream.translator.translate(b'data: {"error": {"message": "dead", "code": 500}}\n\n')
    refusal = b'data: {"error": {"message": "no such thing", "code": 400}}\n\n'
    assert stream.translator.translate(refusal) == refusal


def test_a_transcript_is_bounded() -> None:
    transcript = Transcript(0, max_tokens=5)
    transcript.begin(PROMPT)
    for token in (1, 2):
        assert transcript.add([token], "x") == "x"
    assert not transcript.objection
    assert transcript.add([3], "y") == "y"
    assert (transcript.objection, len(transcript.tokens), len(transcript.prompt)) == ("too long", 0, 0)
    transcript = Transcript(0, max_tokens=100_000)
    transcript.begin(PROMPT)
    for _ in range(20):
        transcript.add([1, 2], "x" * 1000)
    assert transcript.objection == "too much text at once"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"echo": True}, "echo"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"temperature": 0.5, "seed": 1}, "seed with sampling"),
        ({"temperature": None, "stop": "a"}, "stop strings with sampling"),
        ({"stop": ["a" * 2000]}, "long stop strings"),
        ({"truncate_prompt_tokens": 5}, "unknown field"),
        ({"something\r\nnew: ": 1}, "unknown field"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "media"),
        ({"stream": False}, "not a stream of completions"),
        ({"messages": [{"role": "user", "content": "a" * 200_000}]}, "prompt too long"),
    ],
)
def test_what_cannot_be_resumed_says_why(fields: Json, reason: str) -> None:
    with pytest.raises(NotResumable) as told:
        terms_of(request(**fields))
    assert str(told.value) == reason


@pytest.mark.parametrize("prompt", [["a"], ["a", "b"], [[1, 2], [3]], []])
def test_several_prompts_are_not_resumable(prompt: object) -> None:
    with pytest.raises(NotResumable, match="several prompts"):
        terms_of(request(Route.COMPLETIONS, prompt=prompt))


@pytest.mark.parametrize("route", [Route.RESPONSES, Route.MESSAGES])
def test_other_routes_are_not_resumable(route: Route) -> None:
    with pytest.raises(NotResumable):
        terms_of(request(route))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": None},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "logit_bias": {"5": 1}},
        {"seed": 3, "stop": ["a"], "user": "u", "metadata": {}, "service_tier": "flex", "cache_salt": "s"},
        {"response_format": {"type": "text"}, "tool_choice": "none", "stream_options": {"include_usage": True}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant"}]},
    ],
)
def test_plain_text_can_be_resumed(fields: Json) -> None:
    terms = terms_of(request(**fields))
    assert json.loads(terms.armed.body_for("m"))["return_token_ids"] is True
    assert "return_token_ids" not in terms.request.fields


def continued(terms: Terms, context_length: int | None = CONTEXT, resumes_left: int = 0) -> Json:
    stream = Stream(terms)
    stream.take(list(Speaker([b"a", b"b", b"c"]).events(Asked(PROMPT, 99)))[:3])
    request = continuation(terms, stream.transcript, context_length, resumes_left=resumes_left)
    assert request.route is Route.COMPLETIONS
    body: Json = json.loads(request.body_for("served"))
    return body


def test_a_continuation_asks_for_the_rest_and_nothing_else() -> None:
    fields: Json = {"max_tokens": 20, "min_tokens": 5, "stop": "x", "seed": 4, "top_k": 3, "user": "u", "n": 1}
    options = {"include_usage": True, "continuous_usage_stats": False}
    assert continued(terms_of(request(**fields))) == {
        "model": "served",
        "prompt": [*PROMPT, 1000, 1001],
        "max_tokens": 18,
        "min_tokens": 3,
        "stop": "x",
        "seed": 4,
        "top_k": 3,
        "temperature": 0,
        "stream": True,
        "stream_options": options,
    }


@pytest.mark.parametrize(
    ("route", "fields", "most"),
    [
        (Route.CHAT, {"max_tokens": 9, "max_completion_tokens": 7}, 5),
        (Route.CHAT, {"max_tokens": 9, "max_completion_tokens": None}, 7),
        (Route.CHAT, {}, CONTEXT - len(PROMPT) - 2),
        (Route.COMPLETIONS, {}, 14),
        (Route.COMPLETIONS, {"max_tokens": None}, 14),
        (Route.COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 4}, 2),
    ],
)
def test_what_is_left_of_the_limit(route: Route, fields: Json, most: int) -> None:
    assert continued(terms_of(request(route, **fields)))["max_tokens"] == most


def test_without_a_limit_the_context_must_be_known() -> None:
    with pytest.raises(NotResumable, match="context length unknown"):
        continued(terms_of(request()), context_length=None)
    assert continued(terms_of(request(max_tokens=5)), context_length=None)["max_tokens"] == 3


def test_token_ids_are_asked_for_again_while_another_resume_is_left() -> None:
    assert "return_token_ids" not in continued(terms_of(request()))
    assert continued(terms_of(request()), resumes_left=1)["return_token_ids"] is True


def test_a_continuation_stays_in_its_tenants_cache() -> None:
    asked = request()
    asked.cache_salt = "salt"
    assert continued(terms_of(asked))["cache_salt"] == "salt"
