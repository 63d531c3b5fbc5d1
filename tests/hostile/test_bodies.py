"""Bodies and what they mean: the exact status, code and param, and a gateway that is as good as before."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from app.errors import GatewayError, InvalidValue
from app.inference import InferenceRequest, Route
from app.settings import Structured
from app.structured import check_schema
from tests.hostile.bodies import BODIES
from tests.hostile.case import Case
from tests.hostile.conftest import Fortress
from tests.hostile.meanings import MEANINGS

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize("case", BODIES, ids=lambda case: case.id[:80])
async def test_a_body(fortress: Fortress, case: Case) -> None:
    await fortress.refuses(case)


@pytest.mark.parametrize("case", MEANINGS, ids=lambda case: case.id[:80])
async def test_a_meaning(fortress: Fortress, case: Case) -> None:
    await fortress.refuses(case)


BOUNDED = [case for case in BODIES if case.row in ("B37", "B40", "B41") and case.code]


@pytest.mark.parametrize("case", BOUNDED, ids=lambda case: case.id)
async def test_what_it_may_cost(case: Case) -> None:
    """CPU time of this thread, and memory beyond the body: no input buys more than it pays for."""
    body = case.sent.partition(b"\r\n\r\n")[2]
    tracemalloc.start()
    try:
        with pytest.raises(GatewayError):
            InferenceRequest.parse(body, request_id="r", route=Route.CHAT, arrived=0.0)
        memory = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert memory < 4 * len(body) + 1_000_000
    began = time.thread_time()
    with pytest.raises(GatewayError):
        InferenceRequest.parse(body, request_id="r", route=Route.CHAT, arrived=0.0)
    assert time.thread_time() - began < (0.005 if case.row == "B37" else 0.05)


async def test_a_cycle_is_told_from_a_large_schema() -> None:
    cycle = {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}}}}
    with pytest.raises(InvalidValue, match="refers to itself"):
        check_schema(cycle, "schema", Structured())
    shared = {"properties": {"a": {"$ref": "#/$defs/a"}, "b": {"$ref": "#/$defs/a"}}, "$defs": {"a": {}}}
    check_schema(shared, "schema", Structured())
