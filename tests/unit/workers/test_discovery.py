"""Names and files become workers, purely; and names are asked of the system's own resolver."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
import structlog

from app.errors import ConfigurationError
from app.settings import Model, Reload, Variant, Worker, WorkerTls
from app.workers.discovery import NOBODY, Found, Names, expanded, files_in, names_in, read_workers

LISTED = Path("/workers.yaml")


def models(*variants: Variant) -> tuple[Model, ...]:
    return (Model(name="m", variants=variants),)


def urls(found: tuple[Model, ...]) -> list[list[str]]:
    return [[worker.url for worker in variant.workers] for model in found for variant in model.variants]


def test_a_name_is_as_many_workers_as_it_has_addresses() -> None:
    given = models(Variant(name="v", workers=(Worker(url="http://a:1"), Worker(dns="pods:8000", max_concurrency=7))))
    found = expanded(given, Found({"pods:8000": ("10.0.0.1:8000", "[fd00::1]:8000")}))
    assert urls(found) == [["http://a:1", "http://10.0.0.1:8000", "http://[fd00::1]:8000"]]
    assert [worker.max_concurrency for worker in found[0].variants[0].workers] == [64, 7, 7]


def test_a_name_that_stands_for_nobody_leaves_an_empty_variant() -> None:
    assert urls(expanded(models(Variant(name="v", workers=(Worker(dns="pods:8000"),))), Found())) == [[]]


def test_a_worker_that_is_named_twice_belongs_where_it_came_first() -> None:
    given = models(
        Variant(name="v", workers=(Worker(dns="pods:1"), Worker(url="http://10.0.0.1:1"))),
        Variant(name="w", workers=(Worker(dns="pods:1"), Worker(url="http://b:1"))),
    )
    assert urls(expanded(given, Found({"pods:1": ("10.0.0.1:1",)}))) == [["http://10.0.0.1:1"], ["http://b:1"]]


def test_files_add_to_what_is_listed() -> None:
    given = models(Variant(name="v", workers=(Worker(url="http://a:1"),), workers_file=LISTED))
    found = Found(listed={LISTED: (Worker(url="http://b:1"), Worker(dns="pods:1"))})
    assert files_in(given) == {LISTED}
    assert names_in(given, found) == {"pods:1"}
    assert urls(expanded(given, found)) == [["http://a:1", "http://b:1"]]


def test_certificates_are_the_names() -> None:
    tls = WorkerTls(ca_file=Path("/ca.crt"))
    given = models(Variant(name="v", workers=(Worker(dns="pods.ns.svc:443", tls=tls),)))
    (worker,) = expanded(given, Found({"pods.ns.svc:443": ("10.0.0.1:443",)}))[0].variants[0].workers
    assert worker.url == "https://10.0.0.1:443"
    assert worker.tls is not None
    assert (worker.tls.server_name, worker.tls.ca_file) == ("pods.ns.svc", Path("/ca.crt"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- {url: http://a:1}\n- {url: http://b:1, max_concurrency: 4}\n", None),
        ("[]", None),
        ("- {url: nonsense}", "0.url"),
        ("- {url: http://a:1, slots: 4}", "0.slots"),
        ("workers: []", "list"),
        ("", "list"),
        ("- [", "not YAML"),
        ("".join(f"- {{url: 'http://a:{port}'}}\n" for port in range(1, 12)), "more than 10"),
    ],
)
def test_a_file_is_read_whole_or_refused(tmp_path: Path, text: str, said: str | None) -> None:
    file = tmp_path / "workers.yaml"
    file.write_text(text)
    if said is None:
        assert len(read_workers(file, 10)) == text.count("url")
        return
    with pytest.raises(ConfigurationError, match=said) as refused:
        read_workers(file, 10)
    assert str(file) in str(refused.value)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_workers(tmp_path / "none.yaml", 10)


async def test_a_name_is_asked_of_the_system() -> None:
    names = Names(Reload(), structlog.get_logger())
    found = await names.look_up(["localhost:9000", "127.0.0.5:1"])
    assert "127.0.0.1:9000" in found["localhost:9000"]
    assert found["127.0.0.5:1"] == ("127.0.0.5:1",)


async def test_a_name_that_nobody_has_stands_for_nobody() -> None:
    """`.invalid` is kept free by RFC 6761; where no name server is to be had, it is not answered at all."""
    found = await Names(Reload(), structlog.get_logger()).look_up(["nobody.invalid:1"])
    assert not found.get("nobody.invalid:1")


async def test_what_cannot_be_a_name_is_not_answered() -> None:
    """A label of more than 63 characters: Python refuses it in its own way, and the other names are still asked for."""
    found = await Names(Reload(), structlog.get_logger()).look_up([f"{'a' * 64}.test:1", "127.0.0.5:1"])
    assert found == {"127.0.0.5:1": ("127.0.0.5:1",)}


@pytest.mark.parametrize("dns", ["pods", "pods:0", "pods:65536", "http://pods:1", ":1"])
def test_a_name_has_a_port(dns: str) -> None:
    with pytest.raises(ValueError, match="NAME:PORT"):
        Worker(dns=dns)


class Zone:
    """A name server that the test owns: what it answers for every name, now."""

    def __init__(self, *addresses: str) -> None:
        self.answer: tuple[str, ...] | OSError = addresses
        self.is_silent = False

    async def resolve(self, host: str, port: int) -> tuple[str, ...]:
        if self.is_silent:
            await asyncio.Event().wait()
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


def names_of(zone: Zone, **rules: float) -> Names:
    return Names(Reload.model_validate(rules), structlog.get_logger(), zone.resolve)


async def test_addresses_are_bounded_and_in_order() -> None:
    zone = Zone("10.0.0.3", "::1", "10.0.0.1", "10.0.0.2", "10.0.0.1")
    assert await names_of(zone).look_up(["pods:9000"]) == {
        "pods:9000": ("10.0.0.1:9000", "10.0.0.2:9000", "10.0.0.3:9000", "[::1]:9000")
    }
    bounded = await names_of(zone, workers_per_name=2).look_up(["pods:9000"])
    assert bounded == {"pods:9000": ("10.0.0.1:9000", "10.0.0.2:9000")}


@pytest.mark.parametrize(
    "failure",
    [socket.gaierror(socket.EAI_AGAIN, "try again"), socket.gaierror(socket.EAI_FAIL, "failed"), OSError("broken")],
    ids=str,
)
async def test_a_name_server_that_fails_empties_no_pool(failure: OSError) -> None:
    zone = Zone("10.0.0.1")
    names = names_of(zone)
    await names.look_up(["pods:1"])
    zone.answer = failure
    assert await names.look_up(["pods:1"]) == {"pods:1": ("10.0.0.1:1",)}
    assert await names_of(zone).look_up(["pods:1"]) == {}
    zone.answer = ("10.0.0.2",)
    assert await names.look_up(["pods:1"]) == {"pods:1": ("10.0.0.2:1",)}


async def test_a_name_server_that_is_silent_is_waited_for_no_longer_than_it_may() -> None:
    zone = Zone("10.0.0.1")
    names = names_of(zone, dns_timeout_s=0.05)
    await names.look_up(["pods:1"])
    zone.is_silent = True
    async with asyncio.timeout(20):
        assert await names.look_up(["pods:1"]) == {"pods:1": ("10.0.0.1:1",)}


@pytest.mark.parametrize("code", NOBODY)
async def test_an_answer_that_nobody_is_there_empties_the_pool(code: int) -> None:
    zone = Zone("10.0.0.1")
    names = names_of(zone)
    await names.look_up(["pods:1"])
    zone.answer = socket.gaierror(code, "nobody")
    assert await names.look_up(["pods:1"]) == {"pods:1": ()}
