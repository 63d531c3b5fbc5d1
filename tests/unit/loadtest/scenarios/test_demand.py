"""What is asked: the same for the same seed, at the asked rates, as whole HTTP."""

import json
from collections import Counter
from itertools import islice

from loadtest.client import Address
from loadtest.scenarios.demand import BYTES_PER_TOKEN, Ask, Sizes, Stream, asks, endless

STREAMS = [Stream(40.0, "priority"), Stream(10.0, tenants=("a", "b"))]


def test_the_same_seed_asks_the_same() -> None:
    assert asks("x", STREAMS, 5, Sizes(), 1) == asks("x", STREAMS, 5, Sizes(), 1)
    assert asks("x", STREAMS, 5, Sizes(), 1) != asks("x", STREAMS, 5, Sizes(), 2)


def test_arrivals_come_in_order_at_their_streams_rates() -> None:
    found = asks("x", STREAMS, 100, Sizes(), 1)
    assert found == sorted(found, key=lambda ask: ask.due_s)
    bands, tenants = Counter(ask.band for ask in found), Counter(ask.tenant for ask in found)
    # Four standard deviations of a Poisson count.
    assert abs(bands["priority"] - 4000) < 4 * 64
    assert abs(bands["default"] - 1000) < 4 * 32
    assert abs(tenants["a"] - 500) < 4 * 23
    assert len({ask.name for ask in found}) == len(found)


def test_sizes_stay_within_their_bounds_around_the_median() -> None:
    sizes = Sizes()
    outputs = sorted(ask.output_tokens for ask in islice(endless("x", sizes, 1), 2000))
    assert outputs[0] >= sizes.output_bounds[0]
    assert outputs[-1] <= sizes.output_bounds[1]
    assert abs(outputs[1000] - sizes.output_median) <= 3


def test_an_ask_is_whole_http_that_begins_with_its_name() -> None:
    request = Ask("x-7", 0.0, "flex", "someone", 20, 8, 1.5).encode(Address(4711))
    head, _, body = request.partition(b"\r\n\r\n")
    assert b"\r\nx-sluice-tenant: someone\r\nx-sluice-timeout-ms: 1500\r\n" in head
    assert b"content-length: %d" % len(body) in head
    fields = json.loads(body)
    content = fields["messages"][-1]["content"]
    assert content.startswith("x-7 ")
    assert len(content) == 20 * BYTES_PER_TOKEN
    assert (fields["max_tokens"], fields["service_tier"], fields["stream"]) == (8, "flex", True)
