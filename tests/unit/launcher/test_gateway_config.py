"""The gateway's configuration, and the workers it names."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from app.errors import ConfigurationError, LaunchError
from app.launcher.gateway_config import ServedWorker, gateway_config
from app.launcher.network import GivenWorker, identify, reachable, require_free
from app.settings import Settings
from tests.fakes.worker import FakeWorker
from tests.ports import free_port

DENSE = ServedWorker("m", "dense", "http://127.0.0.1:1", "m:dense", slots=8)
W8A8 = ServedWorker("m", "w8a8", "http://127.0.0.1:2", "m:w8a8", 4, "w8a8", Path("/models/m/w8a8/sluice.json"))


def test_workers_become_models_that_the_settings_accept() -> None:
    other = ServedWorker("m", "dense", "http://127.0.0.1:3", "anything")
    config = gateway_config({}, [DENSE, W8A8, other], "unix:///tmp/v.sock?db=0", batches=Path("/kept"))
    assert config["redis"] == {"url": "unix:///tmp/v.sock?db=0"}
    settings = Settings(**config)
    (model,) = settings.models
    assert [variant.name for variant in model.variants] == ["dense", "w8a8"]
    assert [worker.url for worker in model.variants[0].workers] == ["http://127.0.0.1:1", "http://127.0.0.1:3"]
    assert model.variants[1].workers[0].max_concurrency == 4
    assert model.variants[1].manifest == W8A8.manifest


def test_the_users_values_are_kept_and_the_users_models_follow_ours() -> None:
    user = {"drain_timeout_s": 1, "batches": {"lines": 7}, "models": [{"name": "theirs"}]}
    config = gateway_config(user, [DENSE], None, batches=Path("/kept"))
    assert config["batches"] == {"directory": "/kept", "lines": 7}
    assert config["drain_timeout_s"] == 1
    assert [model["name"] for model in config["models"]] == ["m", "theirs"]
    assert "redis" not in config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://gpu:8000", GivenWorker("http://gpu:8000")),
        ("http://gpu:8000/", GivenWorker("http://gpu:8000")),
        ("http://gpu:8000=qwen:fp8", GivenWorker("http://gpu:8000", "qwen", "fp8")),
    ],
)
def test_a_worker_is_given_by_its_address(text: str, expected: GivenWorker) -> None:
    assert GivenWorker.parse(text) == expected


@pytest.mark.parametrize("text", ["", "gpu:8000", "https://gpu", "http://gpu=", "http://gpu=qwen", "http://gpu=:fp8"])
def test_any_other_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--worker"):
        GivenWorker.parse(text)


@pytest.mark.parametrize(
    ("serves", "given", "expected"),
    [
        ("qwen:fp8", (None, None), ("qwen", "fp8")),
        ("org/Qwen-7B", (None, None), ("Qwen-7B", "default")),
        ("org/Qwen-7B", ("qwen", "fp8"), ("qwen", "fp8")),
    ],
)
async def test_a_worker_is_asked_what_it_serves(
    serves: str, given: tuple[str | None, str | None], expected: tuple[str, str]
) -> None:
    async with FakeWorker(serves) as worker:
        found = await asyncio.to_thread(identify, GivenWorker(worker.url, *given))
    assert (found.model, found.variant) == expected
    assert found.served_model == serves


def test_a_worker_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(LaunchError, match=r"no vLLM worker answers there: .*refused"):
        identify(GivenWorker(f"http://127.0.0.1:{free_port()}"))


def test_a_taken_port_is_one_clear_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"127.0.0.1:{port}: address already in use"):
            require_free("127.0.0.1", port)
    require_free("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:1"), ("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1")],
)
def test_a_listener_on_every_interface_is_reached_on_loopback(host: str, url: str) -> None:
    assert reachable(host, 1) == url
