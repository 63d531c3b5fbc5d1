"""Keys: what is kept of one, who it lets in, and how it ends."""

from __future__ import annotations

import hmac
import re
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.tenancy.authentication import presented_key
from app.tenancy.keys import KEY_MAX_BYTES, Key, Pepper, Scope, issue, revoked, successor

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PEPPER = Pepper(b"secret")


@given(st.binary(max_size=200), st.binary(max_size=1000))
def test_a_digest_is_an_hmac(secret: bytes, text: bytes) -> None:
    key = hmac.digest(secret, b"sluice api keys", "sha256")
    assert Pepper(secret).digest(text) == hmac.digest(key, text, "sha256")


def test_a_key_is_long_random_and_not_kept() -> None:
    issued = [issue(PEPPER, "acme", NOW) for _ in range(100)]
    assert len({one.text for one in issued}) == len({one.key.id for one in issued}) == 100
    for one in issued:
        assert re.fullmatch(r"sk-sluice-[A-Za-z0-9_-]{43}", one.text)
        kept = msgspec.json.encode(one.key).decode()
        assert one.text[10:-4] not in kept
        assert one.key.digest == PEPPER.digest(one.text.encode()).hex()
        assert one.key.hint == one.text[-4:]


def test_what_is_kept_differs_with_the_secret() -> None:
    text = issue(PEPPER, "acme", NOW).text.encode()
    assert PEPPER.digest(text) != Pepper(b"").digest(text) != Pepper(b"another").digest(text)


def test_a_key_ends_once_and_never_later() -> None:
    key = issue(PEPPER, "acme", NOW, expires=NOW + timedelta(days=1)).key
    assert key.is_valid(NOW)
    assert not key.is_valid(NOW + timedelta(days=1))
    assert key.ending(NOW + timedelta(days=2)) == key
    assert not key.ending(NOW).is_valid(NOW)


def test_a_successor_lives_as_long_for_the_same_tenant() -> None:
    old = issue(PEPPER, "acme", NOW, scope=Scope.ADMIN, expires=NOW + timedelta(days=90)).key
    new = successor(PEPPER, old, NOW + timedelta(days=80)).key
    assert (new.tenant, new.scope, new.expires) == ("acme", Scope.ADMIN, NOW + timedelta(days=170))
    assert new.digest != old.digest


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65, "ä", "-x"])
def test_a_tenants_name_is_plain(name: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        issue(PEPPER, name, NOW)


def test_no_field_of_a_key_widens_it() -> None:
    """S5: what a key opens is its tenant and its scope; a stored key that says more is refused, not obeyed."""
    fields = msgspec.to_builtins(issue(PEPPER, "acme", NOW).key)
    assert set(Key.__struct_fields__) == {"id", "digest", "hint", "tenant", "scope", "created", "expires"}
    for extra in ({"models": ["m"]}, {"admin": True}, {"scope": "root"}, {"tenant": ["a", "b"]}, {"digest": "x"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({**fields, **extra}, Key)


BEARER = (b"authorization", b"Bearer k")


@pytest.mark.parametrize(
    "headers",
    [
        [BEARER],
        [(b"authorization", b"bearer k")],
        [(b"authorization", b"BEARER  k")],
        [(b"x-api-key", b"k")],
        [(b"api-key", b"k")],
        [BEARER, (b"x-api-key", b"k")],
        [(b"host", b"x"), BEARER, (b"accept", b"*/*")],
    ],
)
def test_a_key_is_found_where_clients_put_it(headers: list[tuple[bytes, bytes]]) -> None:
    assert presented_key(headers) == b"k"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Basic a2V5OmtleQ==")],
        [(b"authorization", b"k")],
        [BEARER, (b"authorization", b"Bearer other")],
        [(b"authorization", b"Bearer other"), BEARER],
        [BEARER, (b"x-api-key", b"other")],
        [(b"x-api-key", b""), (b"api-key", b"k")],
        [(b"authorization", b"Bearer " + b"k" * (KEY_MAX_BYTES + 1))],
        [(b"x-auth-token", b"k")],
    ],
)
def test_what_is_no_key_or_two_is_none(headers: list[tuple[bytes, bytes]]) -> None:
    assert presented_key(headers) == b""


SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("before", "after", "is_told"),
    [
        (None, None, False),
        (None, NOW, True),
        (None, NOW - SECOND, True),
        (None, NOW + SECOND, True),
        (None, NOW + 600 * SECOND, False),
        (None, "gone", True),
        (NOW + SECOND, NOW + SECOND, False),
        (NOW + 600 * SECOND, NOW, True),
        (NOW, NOW, False),
        (NOW, NOW - SECOND, False),
        (NOW, "gone", False),
    ],
    ids=str,
)
def test_a_key_is_revoked_when_it_worked_and_somebody_ended_it(
    before: datetime | None, after: datetime | str | None, is_told: bool
) -> None:
    key = issue(Pepper(b""), "t", NOW - 600 * SECOND, expires=before).key
    left = [] if after == "gone" else [msgspec.structs.replace(key, expires=after)]
    assert revoked([key], left, NOW) == ({key.id} if is_told else set())
