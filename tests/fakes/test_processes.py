"""The building blocks themselves: a real Valkey that can be broken, a worker process that can be killed."""

from __future__ import annotations

import signal

import httpx
import pytest
import redis

from tests.processes import FakeWorkerProcess, Process, Valkey


def test_the_shared_valkey_is_flushed(valkey: Valkey) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        assert client.dbsize() == 0
        client.set("left", "behind")


def test_the_shared_valkey_is_flushed_between_tests(valkey: Valkey) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        assert client.dbsize() == 0
        client.set("left", "behind")


def test_own_valkey_is_killed_and_comes_back_empty_on_the_same_port(own_valkey: Valkey) -> None:
    url = own_valkey.url
    with redis.Redis.from_url(url) as client:
        client.set("a", "1")
        own_valkey.kill()
        assert own_valkey.process.returncode == -signal.SIGKILL
        with pytest.raises(redis.ConnectionError):
            client.ping()
        own_valkey.restart()
        assert own_valkey.url == url
        assert client.get("a") is None


def test_a_paused_valkey_answers_nothing_until_resumed(own_valkey: Valkey) -> None:
    with redis.Redis.from_url(own_valkey.url, socket_timeout=0.2, retry=None) as client:
        own_valkey.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        own_valkey.resume()
        assert client.ping()


def test_a_worker_process_dies_of_the_query_of_death_and_starts_again_with_another_model() -> None:
    with FakeWorkerProcess("m") as worker, httpx.Client(base_url=worker.url, timeout=30) as client:
        body = {"messages": [{"role": "user", "content": "please kill_me_prompt now"}]}
        with pytest.raises(httpx.TransportError):
            client.post("/v1/chat/completions", json=body)
        assert worker.process.wait() == -signal.SIGKILL
        worker.model = "other"
        worker.start()
        assert client.get("/v1/models").json()["data"][0]["id"] == "other"


def test_a_stopped_process_group_is_gone() -> None:
    process = Process(["sh", "-c", "trap '' TERM; echo ready; sleep 60 & wait; sleep 60"])
    process.wait_for_line("ready")
    process.pause()
    process.stop(grace_s=0.1)
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_ends_early_shows_its_output() -> None:
    with Process(["sh", "-c", "echo no such file"]) as process:
        with pytest.raises(RuntimeError, match="no such file"):
            process.wait_for_line("ready")
