"""How the primary is chosen among what nodes say, and which ways to a server may be configured."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import ConfigurationError
from app.redis_server import Address, RedisServer, Word, newest, primary_of_slot
from app.settings import Redis, load_settings

OLD, NEW, ASKED = ("old", 1), ("new", 2), ("asked", 7000)


@pytest.mark.parametrize(
    ("words", "primary"),
    [
        ([Word(OLD, 3)], OLD),
        ([Word(OLD, 3), Word(OLD, 3), Word(NEW, 4)], NEW),
        ([Word(NEW, 4), Word(OLD, 3), Word(OLD, 3)], NEW),
        ([Word(OLD), Word(NEW), Word(NEW)], NEW),
        ([Word(OLD, 9), Word(OLD, 10)], OLD),
    ],
)
def test_the_newest_word_counts_and_then_the_most(words: list[Word], primary: Address) -> None:
    assert newest(words) == primary


@pytest.mark.parametrize(
    ("slot", "primary"),
    [
        (0, ("one", 7001)),
        (99, ("one", 7001)),
        (100, ("asked", 7002)),
        (101, ("asked", 7003)),
        (102, None),
        (103, None),
    ],
)
def test_the_primary_of_a_slot(slot: int, primary: Address | None) -> None:
    """A node that does not know its own name is where it was asked; one at an address unknown to all is nowhere."""
    ranges = [
        [0, 99, [b"one", 7001, b"id", []], [b"replica", 7009, b"id", []]],
        [100, 100, [b"", 7002, b"id", []]],
        [101, 101, [None, 7003, b"id", []]],
        [102, 102, [b"?", 7004, b"id", []]],
    ]
    assert primary_of_slot(ranges, slot, ASKED) == primary


SENTINEL = "sentinel: {master: m, nodes: ['h:1']}"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("url: valkey:6379", "redis.url: expected redis://, rediss:// or unix://"),
        ("url: 'rediss://:canary@h/0?ssl_cert_reqs=none'", "redis.url: its query may name db, and nothing else"),
        ("url: 'redis://h/zero'", "redis.url: behind the host comes the number of a database"),
        ("url: 'redis://h:99999'", "redis.url: expected a port up to 65535"),
        (f"url: 'redis://h', {SENTINEL}", "redis: url, sentinel and cluster: only one of them can be given"),
        (f"cluster: ['h:1'], {SENTINEL}", "redis: url, sentinel and cluster: only one of them can be given"),
        ("username: u", "redis: username: of a server with a url it belongs there, before the host"),
        ("cluster: ['h:1'], username: ''", "redis.username: "),
        ("tls: {}", "redis: tls needs a url with rediss"),
        ("sentinel: {master: m, nodes: []}", "redis.sentinel.nodes: "),
        ("sentinel: {master: m, nodes: [h]}", "redis.sentinel.nodes.0: expected HOST:PORT"),
        ("cluster: ['redis://h:1']", "redis.cluster.0: expected HOST:PORT"),
        ("cluster: ['h:70000']", "redis.cluster.0: expected HOST:PORT"),
        (f"cluster: {[f'h:{port}' for port in range(1, 18)]}", "redis.cluster: "),
    ],
)
def test_a_way_that_is_none(tmp_path: Path, given: str, told: str) -> None:
    path = tmp_path / "sluice.yaml"
    path.write_text(f"redis: {{{given}}}")
    with pytest.raises(ConfigurationError) as refused:
        load_settings(path)
    assert told in str(refused.value)
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        Redis(),
        Redis(url="rediss://u:p@[::1]:6380/3"),
        Redis(url="unix:///run/valkey.sock?db=2"),
        Redis(cluster=("[::1]:7000", "h:7001"), username="u"),
    ],
)
def test_ways_that_are_some(given: Redis) -> None:
    assert RedisServer(given).connect_timeout_s >= given.call_timeout_s


def test_missing_files_are_named() -> None:
    sentinel = {"master": "m", "nodes": ["h:1"], "password_file": "/nowhere/password"}
    with pytest.raises(ConfigurationError, match="/nowhere/password: No such file"):
        RedisServer(Redis.model_validate({"sentinel": sentinel}))
    with pytest.raises(ConfigurationError, match=r"/nowhere/ca.pem: No such file"):
        RedisServer(Redis.model_validate({"cluster": ["h:1"], "tls": {"ca_file": "/nowhere/ca.pem"}}))
