"""Whatever arrives: the pure parts raise nothing but their own errors, and the running gateway answers as it says.

`SLUICE_FUZZ_EXAMPLES` sets how many examples each property gets; `make fuzz` sets it high.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.api.framing import check_head
from app.errors import GatewayError
from app.inference import InferenceRequest, Route, narrowed_salt
from app.relay.sse import EventSplitter, data_of
from app.settings import Limits, Structured
from app.structured import KEYWORDS, check_regex, check_schema
from tests.hostile.bodies import BODIES
from tests.hostile.conftest import Fortress
from tests.hostile.framing import FRAMING, get
from tests.hostile.meanings import MEANINGS
from tests.hostile.raw import exchange

EXAMPLES = int(os.environ.get("SLUICE_FUZZ_EXAMPLES", "100"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)
FIELDS = """model messages n max_tokens stream stream_options tools tool_choice logit_bias stop prompt input metadata
response_format structured_outputs text service_tier temperature"""
NAMES = st.sampled_from(FIELDS.split()) | st.text(max_size=10)
SOURCES = [case.sent.partition(b"\r\n\r\n")[2] for case in (*BODIES, *MEANINGS)]
SMALL = [body for body in SOURCES if len(body) < 4096]


@st.composite
def damaged(draw: st.DrawFn, sources: list[bytes]) -> bytes:
    """A known input with a few bytes put in, taken out or changed."""
    data = bytearray(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3) | st.sampled_from([b"\r\n", b'"', b"\\"]))
    return bytes(data)


def refused(act: Callable[[], object], *statuses: int) -> bool:
    """Whether `act` refuses, which it must do with one of these statuses, and never in another way."""
    try:
        act()
    except GatewayError as error:
        told = error
    else:
        return False
    assert told.status in statuses
    assert told.body().decode()
    return True


def parsed(body: bytes, route: Route) -> InferenceRequest:
    return InferenceRequest.parse(body, request_id="r", route=route, arrived=0.0)


@fuzzed
@given(damaged(SMALL) | st.binary(max_size=200), st.sampled_from(Route))
def test_bytes_as_a_body(body: bytes, route: Route) -> None:
    """What is taken means the same to the worker's decoder, and only what was sent."""
    if refused(lambda: parsed(body, route), 400, 404):
        return
    sent, got = json.loads(body), json.loads(parsed(body, route).body_for("served"))
    assert got.pop("model") == "served"
    got.pop("stream_options", None)
    if "cache_salt" in got:
        assert got.pop("cache_salt") == narrowed_salt("", sent.pop("cache_salt"))
    assert got.items() <= sent.items()


@fuzzed
@given(st.dictionaries(NAMES, VALUES, max_size=8), st.sampled_from(Route))
def test_any_values_in_the_fields(fields: dict[str, Any], route: Route) -> None:
    body = json.dumps({"model": "m", **fields}).encode()
    refused(lambda: parsed(body, route), 400, 404)


@fuzzed
@given(
    st.recursive(
        st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.dictionaries(st.sampled_from(sorted(KEYWORDS)) | st.text(max_size=4), inner, max_size=4)
            | st.lists(inner, max_size=4)
        ),
        max_leaves=30,
    ).filter(lambda schema: isinstance(schema, dict))
)
def test_any_schema(schema: Any) -> None:
    refused(lambda: check_schema(schema, "schema", Structured()), 400)


@fuzzed
@given(st.text(alphabet="ab(){}[]*+?\\|.,1", max_size=40))
def test_any_regex(pattern: str) -> None:
    refused(lambda: check_regex(pattern, "regex", Structured()), 400)


@fuzzed
@given(
    st.sampled_from(["GET", "POST", "TRACE"]) | st.text(max_size=5),
    st.sampled_from(["1.0", "1.1", "2.0"]),
    st.binary(max_size=20) | st.just(b"/"),
    st.lists(
        st.tuples(
            st.sampled_from([b"host", b"content-length", b"transfer-encoding", b"expect", b"x"]),
            st.binary(max_size=12) | st.sampled_from([b"x", b"chunked", b"5", b"100-continue"]),
        ),
        max_size=6,
    ),
)
def test_any_head(method: str, version: str, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """What passes has one host, at most one framing, and a path."""
    if refused(lambda: check_head(method, version, target, headers, Limits()), 400, 405, 417, 431):
        return
    names = [name for name, _ in headers]
    assert names.count(b"host") == 1 or (version == "1.0" and b"host" not in names)
    assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
    assert target.startswith(b"/")


@fuzzed
@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"data: x\n\n", b"\r", b"\n", b"data"]), max_size=12))
def test_any_stream(parts: list[bytes]) -> None:
    """No byte is lost, made up or held back by where the network cuts, and only whole events come out."""
    splitter = EventSplitter()
    events = [event for part in parts for event in splitter.feed(part)]
    assert b"".join(parts).startswith(b"".join(events))
    for event in events:
        assert event.endswith((b"\n", b"\r"))
        assert isinstance(data_of(event), bytes)


@pytest.mark.asyncio(loop_scope="session")
async def test_the_connection_answers_or_closes(hasty: Fortress) -> None:
    """Damaged requests on real sockets: every answer is whole and in OpenAI's shape, and none is a 5xx."""
    sources = [case.sent for case in FRAMING if len(case.sent) < 2048]
    damage: list[bytes] = []

    @settings(max_examples=min(EXAMPLES, 2000), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged(sources))
    def collect(data: bytes) -> None:
        damage.append(data)

    collect()
    for data in damage:
        # Behind a request that came out whole, this one ends the connection; in any other it is part of the damage.
        for answer in await exchange(hasty.gateway.url, data + get()):
            assert answer.status in (200, 400, 404, 405, 408, 411, 413, 414, 415, 417, 431), data
            if answer.status >= 400 and not data.startswith(b"HEAD"):
                assert answer.error["code"]
    await hasty.holds()
