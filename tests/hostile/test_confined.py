"""S34: the gateway runs as nobody, without capabilities, without a way to gain any, on a file system that it cannot
write to. The container's limits, made with what Linux has: `unshare`, read-only mounts and `setpriv`."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from tests.fakes.worker import FakeWorker
from tests.hostile.case import CHAT
from tests.integration.gateway.asking import chat
from tests.integration.gateway.running import model, until
from tests.ports import free_port
from tests.processes import ROOT, Process

NOBODY = 65534
# Everything read-only but an empty /tmp; then no user, no groups, no capability, and none to be had by any program.
CONFINE = (
    "mount --make-rprivate / && {interpreter} mount -o remount,bind,ro /"
    " && mount -t tmpfs -o size=16m,mode=1777 tmpfs /tmp && cd {root}"
    " && exec setpriv --reuid {uid} --regid {uid} --clear-groups --bounding-set -all --inh-caps -all --no-new-privs"
    " {command}"
)
# For a Python in a home that is its owner's only: in there it is all that this home holds, and everyone's to read.
OPENED = (
    "mount --bind {base} /mnt && mount -t tmpfs -o mode=755 tmpfs {home}"
    " && mkdir -p {base} && mount --bind /mnt {base} &&"
)


def confined(*command: str) -> list[str]:
    base = Path(sys.base_prefix)
    home = next((place for place in reversed(base.parents) if not place.stat().st_mode & 0o001), None)
    interpreter = OPENED.format(base=base, home=home) if home is not None else ""
    script = CONFINE.format(interpreter=interpreter, root=ROOT, uid=NOBODY, command=" ".join(command))
    return ["unshare", "-m", "sh", "-c", script]


def missing() -> str:
    """Why this machine cannot confine a process; empty when it can."""
    if os.geteuid() != 0:
        return "only root may make a mount namespace and then leave root"
    if absent := [name for name in ("unshare", "setpriv", "mount") if shutil.which(name) is None]:
        return f"no {', '.join(absent)} here"
    tried = subprocess.run(confined(sys.executable, "-c", "'import app, httptools'"), capture_output=True, text=True)
    return f"this machine does not let us: {tried.stderr.strip()[-200:]}" if tried.returncode else ""


@pytest.fixture(scope="module")
def config_directory() -> Path:
    """Outside /tmp, which is another one in there, and readable by nobody."""
    if reason := missing():
        pytest.skip(reason)
    directory = ROOT / ".sluice"
    directory.mkdir(mode=0o755, exist_ok=True)
    return directory


async def test_it_serves_as_nobody_on_a_disk_it_cannot_write(config_directory: Path) -> None:
    async with FakeWorker("m") as worker:
        port = free_port()
        path = config_directory / f"confined-{port}.yaml"
        path.write_text(yaml.safe_dump({"listen": {"port": port, "processes": 2}, "models": [model("m", worker)]}))
        path.chmod(0o644)
        command = confined(sys.executable, "-m", "app", "gateway", "--config", str(path))
        environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            with Process(command, environment) as process:
                await asyncio.to_thread(process.wait_for_line, "Application startup complete")
                assert_confined(process.pid)
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:

                    async def is_ready() -> bool:
                        return (await client.get("/readyz")).status_code == 200

                    await until(is_ready, "ready", 20.0)
                    answers = [await client.post(CHAT, json=chat(stream=stream)) for stream in (False, True)]
                    assert [answer.status_code for answer in answers] == [200, 200]
                    assert "sluice_requests_total" in (await client.get("/metrics")).text
                process.terminate()
                assert await asyncio.to_thread(process.wait, 40.0) == 0
        finally:
            path.unlink()


def assert_confined(pid: int) -> None:
    """The kernel's own word for it."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(NOBODY)}
    assert status["Groups"].strip() == ""
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    root = Path(f"/proc/{pid}/mounts").read_text(encoding="utf-8").splitlines()
    assert [line.split()[3].split(",")[0] for line in root if line.split()[1] == "/"][-1] == "ro"
