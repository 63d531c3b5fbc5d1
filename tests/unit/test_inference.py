"""Reading a request: what is decoded, what is refused, and what reaches the worker as it came."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.errors import GatewayError, InvalidJson, InvalidValue, UnsupportedParameter
from app.inference import REFUSED_FIELDS, Band, InferenceRequest, Route, cache_salt
from app.tenant import ANONYMOUS, Tenant


def parse(body: bytes | dict[str, Any], route: Route = Route.CHAT, *, tenant: Tenant = ANONYMOUS) -> InferenceRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return InferenceRequest.parse(raw, request_id="r", route=route, arrived=1.0, tenant=tenant)


def sent(request: InferenceRequest, served: str = "served") -> Any:
    return json.loads(request.body_for(served))


def test_the_worker_gets_the_clients_own_bytes() -> None:
    values = b'[{"role":"user","content":"caf\\u00e9 \xe2\x82\xac"}]'
    request = parse(
        b'{"model": "m", "messages": %s, "seed": 18446744073709551617, "top_p": 1.0, "x": {"y" : [ ]}}' % values
    )
    body = request.body_for("served")
    assert values in body
    assert b"18446744073709551617" in body
    assert b'"top_p":1.0' in body
    assert b'{"y" : [ ]}' in body
    assert sent(request)["model"] == "served"


def test_usage_is_asked_for_and_hidden_when_the_client_did_not_ask() -> None:
    request = parse({"model": "m", "stream": True, "stream_options": {"continuous_usage_stats": True}})
    assert request.hides_usage
    assert sent(request)["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}


def test_a_clients_own_stream_options_are_left_alone() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    request = parse({"model": "m", "stream": True, "stream_options": options})
    assert not request.hides_usage
    assert sent(request)["stream_options"] == options


@pytest.mark.parametrize("route", [Route.RESPONSES, Route.MESSAGES])
def test_apis_that_always_tell_usage_are_not_asked(route: Route) -> None:
    assert "stream_options" not in sent(parse({"model": "m", "stream": True}, route))


def test_a_route_that_never_streams() -> None:
    assert not parse({"model": "m", "stream": True}, Route.EMBEDDINGS).stream


@pytest.mark.parametrize(
    ("tier", "band"),
    [("auto", Band.DEFAULT), ("default", Band.DEFAULT), ("priority", Band.PRIORITY), ("flex", Band.FLEX)],
)
def test_bands_are_openais_service_tiers(tier: str, band: Band) -> None:
    assert parse({"model": "m", "service_tier": tier}).band is band


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_fields_that_steer_the_engine_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse({"model": "m", name: 1})
    assert caught.value.param == name


def test_fields_that_are_the_gateways_are_left_out() -> None:
    request = parse({"model": "m", "priority": -5, "session_id": "theirs", "request_id": "x", "top_k": 3})
    assert sent(request) == {"model": "served", "top_k": 3}


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        (b"", InvalidJson, None),
        (b"{", InvalidJson, None),
        (b'{"model": "m"} x', InvalidJson, None),
        (b"null", InvalidValue, None),
        (b"[]", InvalidValue, None),
        (b"{}", InvalidValue, "model"),
        (b'{"model": 7}', InvalidValue, "model"),
        (b'{"model": "m", "stream": "yes"}', InvalidValue, "stream"),
        (b'{"model": "m", "stream": 1}', InvalidValue, "stream"),
        (b'{"model": "m", "service_tier": "gold"}', InvalidValue, "service_tier"),
        (b'{"model": "m", "stream": true, "stream_options": []}', InvalidValue, "stream_options"),
        (b'{"model": "m", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", InvalidJson, None),
        (b'{"model": "\xff"}', GatewayError, None),
    ],
)
def test_what_cannot_be_read(body: bytes, error: type[GatewayError], param: str | None) -> None:
    with pytest.raises(error) as caught:
        parse(body)
    assert caught.value.status == 400
    if param is not None:
        assert caught.value.param == param


def test_null_means_absent() -> None:
    assert parse({"model": "m", "stream": None, "service_tier": None, "stream_options": None}).band is Band.DEFAULT


@pytest.mark.parametrize(
    ("route", "body", "start"),
    [
        (
            Route.CHAT,
            b'{"messages": [{"role":"user"}], "n": 1, "tools": ["t"], "model": "m"}',
            b'["t"][{"role":"user"}]',
        ),
        (Route.CHAT, b'{"model": "m", "messages": null}', b"null"),
        (Route.CHAT, b'{"model": "m"}', b""),
        (Route.COMPLETIONS, b'{"model": "m", "prompt": [5, 6]}', b"[5, 6]"),
        (Route.RESPONSES, b'{"model": "m", "input": "hi", "instructions": "be"}', b'"be""hi"'),
        (Route.MESSAGES, b'{"model": "m", "messages": [], "system": "be", "tools": []}', b'[]"be"[]'),
        (Route.EMBEDDINGS, b'{"model": "m", "input": "hi", "messages": []}', b""),
    ],
)
def test_a_prompt_starts_with_what_templates_write_first(route: Route, body: bytes, start: bytes) -> None:
    request = parse(body, route)
    assert request.prompt_start(1_000) == start
    for limit in range(len(start)):
        assert request.prompt_start(limit) == start[:limit]


def test_a_conversation_starts_as_it_did_a_turn_ago() -> None:
    turns = [{"role": "user", "content": "caf\u00e9"}, {"role": "assistant", "content": "x"}]
    before, after = (parse({"model": "m", "messages": turns[:count]}).prompt_start(1_000) for count in (1, 2))
    assert after.startswith(before.removesuffix(b"]"))


def test_the_salt_is_the_tenants_and_never_the_clients() -> None:
    acme = Tenant("acme", cache_salt=cache_salt(b"secret", "acme"))
    assert sent(parse({"model": "m"}, tenant=acme)) == {"model": "served", "cache_salt": acme.cache_salt}


def test_a_clients_salt_only_narrows_its_tenants() -> None:
    """Whatever a client sends, it shares a cache with nobody who sends another salt, or is another tenant."""
    tenants = [Tenant(name, cache_salt=cache_salt(b"secret", name)) for name in ("one", "two")]
    everybodys = {tenant.cache_salt for tenant in (*tenants, ANONYMOUS)}
    sent_salts = ["", "x", tenants[0].cache_salt, tenants[1].cache_salt]
    found = [parse({"model": "m", "cache_salt": salt}, tenant=tenant).cache_salt
             for tenant in (*tenants, ANONYMOUS) for salt in sent_salts]  # fmt: skip
    assert len({*found, *everybodys}) == 15
    assert all(len(salt) == 32 for salt in found)
    again = parse({"model": "m", "cache_salt": "x"}, tenant=tenants[0])
    assert again.cache_salt == found[1]


def test_a_salt_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidValue):
        parse({"model": "m", "cache_salt": 5})


def test_a_salt_is_stable_short_plain_and_differs_by_tenant_and_by_secret() -> None:
    # HMAC-SHA-256 with the key "key", its well-known example value.
    assert cache_salt(b"key", "The quick brown fox jumps over the lazy dog") == "f7bc83f430538424b13298e6aa6fb143"
    salts = {cache_salt(secret, tenant) for secret in (b"one", b"two") for tenant in ("a", "b", "ä", "")}
    assert len(salts) == 8
    assert all(len(salt) == 32 and salt.isalnum() for salt in salts)


@pytest.mark.parametrize(
    ("asked", "ceiling", "got"),
    [
        ("priority", Band.PRIORITY, Band.PRIORITY),
        ("priority", Band.DEFAULT, Band.DEFAULT),
        ("auto", Band.PRIORITY, Band.DEFAULT),
        ("default", Band.FLEX, Band.FLEX),
        ("flex", Band.DEFAULT, Band.FLEX),
        ("priority", Band.BATCH, Band.BATCH),
    ],
)
def test_a_tier_above_the_tenants_ceiling_is_lowered(asked: str, ceiling: Band, got: Band) -> None:
    assert parse({"model": "m", "service_tier": asked}, tenant=Tenant("t", ceiling=ceiling)).band is got


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_more_tokens_than_the_tenant_may_ask_for_are_refused(name: str) -> None:
    tenant = Tenant("t", max_tokens=100)
    assert parse({"model": "m", name: 100}, tenant=tenant).max_tokens == 100
    with pytest.raises(InvalidValue) as caught:
        parse({"model": "m", name: 101}, tenant=tenant)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("route", "fields", "sent_as"),
    [
        (Route.CHAT, {}, {"max_completion_tokens": 100}),
        (Route.CHAT, {"max_tokens": None}, {"max_tokens": None, "max_completion_tokens": 100}),
        (Route.CHAT, {"max_tokens": 7}, {"max_tokens": 7}),
        (Route.COMPLETIONS, {}, {"max_tokens": 16}),
        (Route.RESPONSES, {}, {"max_output_tokens": 100}),
        (Route.MESSAGES, {"max_tokens": 9}, {"max_tokens": 9}),
        (Route.EMBEDDINGS, {}, {}),
    ],
)
def test_who_names_no_number_gets_the_tenants_bound(
    route: Route, fields: dict[str, Any], sent_as: dict[str, Any]
) -> None:
    body = sent(parse({"model": "m", **fields}, route, tenant=Tenant("t", max_tokens=100)))
    assert {name: value for name, value in body.items() if name.startswith("max")} == sent_as


def test_engine_fields_are_for_tenants_that_may() -> None:
    body = {"model": "m", "kv_transfer_params": {"x": 1}}
    assert sent(parse(body, tenant=Tenant("t", engine_fields=True)))["kv_transfer_params"] == {"x": 1}
    with pytest.raises(UnsupportedParameter):
        parse(body, tenant=Tenant("t"))
