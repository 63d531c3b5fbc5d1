"""W3C Trace Context: what is a trace, to the letter, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.telemetry.trace_context import TraceContext, accepted, trace_id_of

TRACE, SPAN = b"0af7651916cd43dd8448eb211c80319c", b"b7ad6b7169203331"
PARENT = b"00-%b-%b-01" % (TRACE, SPAN)


def given_as(parent: bytes, *states: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return accepted([(b"traceparent", parent), *((b"tracestate", state) for state in states)])


@pytest.mark.parametrize("parent", [PARENT, PARENT[:-2] + b"00", PARENT[:-2] + b"ff", b"cc" + PARENT[2:] + b"-more"])
def test_a_trace(parent: bytes) -> None:
    assert given_as(parent) == ((b"traceparent", parent),)
    context = TraceContext.of(given_as(parent))
    assert context is not None
    assert (context.trace_id, context.span_id) == (int(TRACE, 16), int(SPAN, 16))
    assert context.is_sampled == (parent[53:55] != b"00")
    assert trace_id_of(given_as(parent)) == TRACE.decode()


@pytest.mark.parametrize(
    "parent",
    [
        b"",
        PARENT + b"-more",
        PARENT + b"\n",
        b" " + PARENT,
        PARENT.upper(),
        b"ff" + PARENT[2:],
        b"cc" + PARENT[2:] + b"more",
        b"00-%b-%b-01" % (b"0" * 32, SPAN),
        b"00-%b-%b-01" % (TRACE, b"0" * 16),
        b"00-%b-%b-1" % (TRACE, SPAN),
        b"00-%b-%b" % (TRACE, SPAN),
        b"00-%b-%b-zz" % (TRACE, SPAN),
        PARENT.replace(b"-", b"_"),
    ],
)
def test_none(parent: bytes) -> None:
    assert given_as(parent, b"a=b") == ()
    assert TraceContext.of(((b"traceparent", parent),)) is None


def test_said_twice_is_not_said() -> None:
    assert accepted([(b"traceparent", PARENT), (b"traceparent", PARENT)]) == ()
    assert given_as(PARENT, b"a=b", b"c=d") == ((b"traceparent", PARENT),)


@pytest.mark.parametrize("state", [b"a=b", b"a=b,c@d=e f", b"a=b, c=d", b"a=1,,b=2", b"a*/_-=!~"])
def test_a_state(state: bytes) -> None:
    assert given_as(PARENT, state)[1:] == ((b"tracestate", state),)


@pytest.mark.parametrize(
    "state",
    [b"", b"a", b"a=", b"=b", b"A=b", b"a=b=c", b"a=\xff", b"a=\t", b"a=" + b"b" * 511, b",".join([b"a=b"] * 33)],
)
def test_no_state(state: bytes) -> None:
    assert given_as(PARENT, state) == ((b"traceparent", PARENT),)


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans(), st.sampled_from([b"", b"a=b"]))
def test_what_is_written_is_read(trace_id: int, span_id: int, is_sampled: bool, state: bytes) -> None:
    context = TraceContext(trace_id, span_id, is_sampled, state)
    assert accepted(context.headers) == context.headers
    assert TraceContext.of(context.headers) == context
