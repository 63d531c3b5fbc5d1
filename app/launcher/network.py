"""Addresses on this machine, and what already answers on the network."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from app.errors import ConfigurationError, LaunchError
from app.launcher.gateway_config import ServedWorker

PROBE_TIMEOUT_S = 3.0
ANSWER_MAX_BYTES = 1024 * 1024
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
DEFAULT_VARIANT = "default"


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on at this moment."""
    with _bound(host, 0) as probe:
        port: int = probe.getsockname()[1]
        return port


def require_free(host: str, port: int) -> None:
    """Raises LaunchError when nobody could listen on `host:port` now."""
    try:
        _bound(host, port).close()
    except OSError as error:
        raise LaunchError(f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}") from None


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Without this a port that a stopped gateway has just left counts as taken for a minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    except OSError:
        probe.close()
        raise
    return probe


def reachable(host: str, port: int) -> str:
    """`http://HOST:PORT` as seen from this machine, also for a server that listens everywhere."""
    name = EVERYWHERE.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@dataclass(frozen=True, slots=True)
class GivenWorker:
    """`--worker URL[=MODEL:VARIANT]`."""

    url: str
    model: str | None = None
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> GivenWorker:
        """Raises ConfigurationError for anything but that form."""
        url, equals, name = text.partition("=")
        model, _, variant = name.partition(":")
        if not url.startswith("http://") or (equals and not (model and variant)):
            raise ConfigurationError(f"--worker {text}: expected http://HOST:PORT or http://HOST:PORT=MODEL:VARIANT")
        return cls(url.rstrip("/"), model or None, variant or None)


def identify(given: GivenWorker) -> ServedWorker:
    """Asks a worker what it serves. Raises LaunchError when it does not say.

    A name such as `smollm2:w8a8` tells model and variant; any other is a model whose only variant is `default`.
    """
    served = _served_models(given.url)
    chosen = next((name for name in served if name == f"{given.model}:{given.variant}"), served[0])
    model, _, variant = chosen.rpartition("/")[2].partition(":")
    return ServedWorker(
        model=given.model or model,
        variant=given.variant or variant or DEFAULT_VARIANT,
        url=given.url,
        served_model=chosen,
    )


def _served_models(url: str) -> list[str]:
    try:
        answer = get_json(f"{url}/v1/models")
        names = [str(entry["id"]) for entry in answer["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", None) or error
        raise LaunchError(f"{url}: no vLLM worker answers there: {reason}") from None
    if not names:
        raise LaunchError(f"{url}: this worker serves no model")
    return names


def get_json(url: str) -> Any:
    """A GET on a server of ours: never through a proxy. Also reads the body of an error answer.

    Raises OSError where nothing answers, ValueError for what is not JSON.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PROBE_TIMEOUT_S) as response:
            return json.loads(response.read(ANSWER_MAX_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            return json.loads(error.read(ANSWER_MAX_BYTES))
