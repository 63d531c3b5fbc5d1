"""Certificates and keys that cannot be used are told in one line, with where they are and never what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.catalogue import Catalogue
from app.credentials import SECRET_MAX_BYTES, read_secret, redis_password, tls_failure
from app.errors import ConfigurationError
from app.settings import Redis, Settings, load_settings
from tests.certificates import Authority


def catalogue(directory: Path, worker: str) -> Catalogue:
    path = directory / "sluice.yaml"
    path.write_text(f"models: [{{name: m, variants: [{{name: v, workers: [{worker}]}}]}}]")
    return Catalogue.of(load_settings(path).models)


@pytest.mark.parametrize(
    ("worker", "fact"),
    [
        ("{url: 'http://x:1', tls: {}}", "tls needs a url with https"),
        ("{url: 'https://x:1', tls: {verify: none}}", "'full' or 'chain'"),
        ("{url: 'https://x:1', tls: {verify: false}}", "'full' or 'chain'"),
        ("{url: 'https://x:1', tls: {verify: chain}}", "needs a ca_file"),
        ("{url: 'https://x:1', tls: {key_file: k}}", "needs a cert_file"),
        ("{url: 'https://x:1', tls: {ca_file: /nowhere/ca.pem}}", "/nowhere/ca.pem: No such file"),
        ("{url: 'https://x:1', tls: {ca_file: README.md}}", "README.md: not a certificate"),
        ("{url: 'https://x:1', tls: {cert_file: README.md}}", "README.md: not a certificate"),
        ("{url: 'http://x:1', api_key_file: /nowhere/key}", "/nowhere/key: No such file"),
        ("{url: 'http://x:1', api_key_file: README.md}", "README.md: expected one line"),
        ("{url: 'http://x:1', api_key_env: NOT_SET_ANYWHERE}", "$NOT_SET_ANYWHERE: expected one line"),
        ("{url: 'http://x:1', api_key_env: A, api_key_file: b}", "exclude each other"),
        ("{url: 'http://x:1', api_key: secret}", "api_key: unknown key"),
        ("{url: 'http://x:1'}, {url: 'https://x:1'}", "listed twice"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, worker: str, fact: str) -> None:
    with pytest.raises(ConfigurationError) as told:
        catalogue(tmp_path, worker)
    assert fact in str(told.value)
    assert "\n" not in str(told.value)


def test_a_key_that_is_not_the_certificates(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    one, two = ours.client("one"), ours.client("two")
    with pytest.raises(ConfigurationError, match="do not belong together"):
        catalogue(
            tmp_path, f"{{url: 'https://x', tls: {{cert_file: {one['cert_file']}, key_file: {two['key_file']}}}}}"
        )


def test_workers_with_the_same_certificates_share_a_context(tmp_path: Path) -> None:
    tls = f"tls: {{ca_file: {Authority(tmp_path).ca_file}, server_name: NAME}}"
    workers = ", ".join(f"{{url: 'https://{name}', {tls.replace('NAME', name)}}}" for name in ("a", "b"))
    one, two = catalogue(tmp_path, workers).variants[0].workers
    assert one.tls is two.tls
    assert (one.server_name, two.server_name, one.port, one.url) == ("a", "b", 443, "https://a")


def test_a_key_is_one_line_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(" a-key-of-its-own\n")
    monkeypatch.setenv("THE_KEY", "another")
    assert (read_secret(file, None), read_secret(None, "THE_KEY"), read_secret(None, None)) == (
        "a-key-of-its-own", "another", "",
    )  # fmt: skip
    (address,) = catalogue(tmp_path, f"{{url: 'http://x:1', api_key_file: {file}}}").variants[0].workers
    assert address.api_key == "a-key-of-its-own"
    assert address.api_key not in repr(address)
    for wrong in ("two\nlines", "", "nul\0", "ä", "x" * (SECRET_MAX_BYTES + 1)):
        file.write_text(wrong)
        with pytest.raises(ConfigurationError) as told:
            read_secret(file, None)
        assert not wrong or wrong not in str(told.value)


def test_settings_hold_no_key_of_a_worker() -> None:
    """A dump of the configuration shows where keys are, so it may be shown."""
    fields = {name for name in Settings.model_json_schema()["$defs"]["Worker"]["properties"] if "key" in name}
    assert fields == {"api_key_file", "api_key_env"}


def test_what_is_not_about_tls_is_no_failure_of_it() -> None:
    assert tls_failure(ConnectionRefusedError(111, "refused")) is None
    assert tls_failure(None) is None


@pytest.mark.parametrize(
    ("redis", "fact"),
    [
        ("{url: 'redis://:x@h:1', password_file: f}", "redis: a password in url and password_file are both given"),
        ("{password: x}", "redis.password: unknown key"),
    ],
)
def test_a_redis_password_that_contradicts(tmp_path: Path, redis: str, fact: str) -> None:
    path = tmp_path / "sluice.yaml"
    path.write_text(f"redis: {redis}")
    with pytest.raises(ConfigurationError) as told:
        load_settings(path)
    assert fact in str(told.value)


def test_a_redis_password_is_read_where_it_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "password"
    kept.write_text("the password\n".replace(" ", "-"))
    assert redis_password(Redis(password_file=kept)) == "the-password"
    assert redis_password(Redis()) is None
    with pytest.raises(ConfigurationError, match="/nowhere/password: No such file"):
        redis_password(Redis(password_file=Path("/nowhere/password")))
