"""A start that cannot succeed says why in one line, does not wait, and leaves nothing behind."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.integration.gateway.running import start_gateway

TIMEOUT_S = 60.0
FAILED, WRONG_CONFIGURATION = 1, 2


def refused(*arguments: str) -> tuple[int, str]:
    """The exit code and the one line that a start with these arguments ends in."""
    with start_gateway(*arguments) as process:
        code = process.wait(TIMEOUT_S)
        lines = process.output.splitlines()
    assert len(lines) == 1, process.output
    return code, lines[0]


def written(directory: Path, text: str | bytes) -> Path:
    path = directory / "sluice.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("models: [", ["not YAML"]),
        ("", ["mapping"]),
        ("listen: {prot: 1}", ["listen.prot", "unknown key"]),
        ("listen: {port: 70000}", ["listen.port", "65535"]),
        ("models: [{name: m, variants: [{name: v, workers: [{url: 'ftp://x'}]}]}]", ["url", "http://HOST:PORT"]),
        ("models: [{name: m, variants: [{name: v, manifest: nowhere/sluice.json, workers: [{url: 'http://x:1'}]}]}]",
         ["nowhere/sluice.json", "No such file"]),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_used(tmp_path: Path, text: str | bytes, facts: list[str]) -> None:
    path = written(tmp_path, text)
    code, line = refused("--config", str(path))
    assert code == WRONG_CONFIGURATION
    assert all(fact in line for fact in facts), line


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    code, line = refused("--config", str(tmp_path / "missing.yaml"))
    assert code == WRONG_CONFIGURATION
    assert "missing.yaml" in line
    assert "No such file" in line


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_port_that_is_taken(tmp_path: Path, processes: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        path = written(tmp_path, "models: []")
        code, line = refused("--config", str(path), "--port", port, "--processes", processes)
    assert code == FAILED
    assert f"127.0.0.1:{port}" in line
    assert "in use" in line


def test_an_option_that_does_not_exist() -> None:
    with start_gateway("--prot", "1") as process:
        assert process.wait(TIMEOUT_S) == WRONG_CONFIGURATION
        assert "--prot" in process.output
        assert "Traceback" not in process.output


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("listen: {host: 0.0.0.0, port: 0}\nadmin: {port: 0}", ["there is no key", "sluice keys create"]),
        ("auth: {enabled: true}\nlisten: {port: 0}", ["there is no key"]),
        ("auth: {enabled: true, key_files: [FILE]}\nlisten: {port: 0}", ["FILE", "No such file"]),
        ("auth: {enabled: true, key_files: [EMPTY]}\nlisten: {port: 0}", ["there is no key"]),
        ("auth: {enabled: true, key_files: [BROKEN]}\nlisten: {port: 0}", ["BROKEN", "digest"]),
        ("auth: {enabled: true, secret_file: FILE}\nlisten: {port: 0}", ["FILE", "No such file"]),
    ],
)
def test_s1_nobody_could_get_in(tmp_path: Path, text: str, facts: list[str]) -> None:
    (tmp_path / "EMPTY").write_text("keys: []")
    (tmp_path / "BROKEN").write_text("keys: [{id: key_0000000000000000, digest: sk-sluice-a-key-itself}]")
    for name in ("FILE", "EMPTY", "BROKEN"):
        text = text.replace(name, str(tmp_path / name))
    code, line = refused("--config", str(written(tmp_path, text)))
    assert code == WRONG_CONFIGURATION
    assert all(fact in line for fact in facts), line
    assert "sk-sluice-a-key-itself" not in line
