"""Names and files become workers, purely; and names are asked of the system's own resolver."""

from __future__ import annotations

from pathlib import Path

import pytest
import structlog

from app.errors import ConfigurationError
from app.settings import Model, Reload, Variant, Worker, WorkerTls
from app.workers.discovery import Found, Names, expanded, files_in, names_in, read_workers

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


async def test_addresses_are_bounded() -> None:
    names = Names(Reload(workers_per_name=1), structlog.get_logger())
    found = await names.look_up(["localhost:9000"])
    assert len(found["localhost:9000"]) == 1
