"""The review of what vLLM takes from clients (S13, S15): the gateway does what it says, and it is complete."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.errors import GatewayError, UnsupportedParameter
from app.inference import InferenceRequest, Route
from app.launcher.home import Home
from app.workers.versions import REVIEWED
from tests.hostile.conftest import Fortress

HERE = Path(__file__).parent / "reviewed"
REVIEW: dict[str, Any] = yaml.safe_load((HERE / "vllm.yaml").read_text(encoding="utf-8"))
ROUTES: dict[str, dict[str, list[str]]] = REVIEW["routes"]
BASE: dict[str, Any] = {
    Route.CHAT: {"messages": [{"role": "user", "content": "x"}]},
    Route.MESSAGES: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
}


def fields(disposition: str) -> list[tuple[str, str]]:
    return [(route, name) for route, review in ROUTES.items() for name in review[disposition]]


def sent(route: str, name: str, value: Any) -> dict[str, Any]:
    """What a worker gets of a request with this field. Raises GatewayError."""
    body = json.dumps({"model": "m", **BASE.get(route, {}), name: value}).encode()
    request = InferenceRequest.parse(body, request_id="r", route=Route(route), arrived=0.0)
    told: dict[str, Any] = json.loads(request.body_for("served"))
    return told


@pytest.mark.parametrize(("route", "name"), fields("refused"))
def test_what_steers_the_engine_is_refused(route: str, name: str) -> None:
    with pytest.raises(UnsupportedParameter) as told:
        sent(route, name, "x")
    assert told.value.param == name


@pytest.mark.parametrize(("route", "name"), fields("removed"))
def test_what_is_the_gateways_does_not_reach_the_worker_as_it_came(route: str, name: str) -> None:
    """It is left out or, as a salt, made into one of the tenant's."""
    assert sent(route, name, "theirs").get(name) != "theirs"


@pytest.mark.parametrize(("route", "name"), fields("passed"))
def test_the_rest_passes_as_it_came(route: str, name: str) -> None:
    assert sent(route, name, 7)[name] == 7


@pytest.mark.parametrize(("route", "name"), fields("judged"))
def test_what_is_judged_does_not_pass_whatever_it_is(route: str, name: str) -> None:
    """Something that no such field can be: a list of a thousand images that somebody else's server holds."""
    absurd = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}] * 1000
    try:
        told = sent(route, name, {"content": absurd} if name in ("tools", "text", "output_config") else absurd)
    except GatewayError:
        return
    # Those three hold what only some of their own fields are judged for; the model's name is replaced.
    assert name in ("tools", "text", "output_config", "tool_choice", "response_format", "structured_outputs", "prompt",
                    "stream_options") or told[name] != absurd  # fmt: skip


def test_every_route_is_reviewed_and_no_other_is_relayed() -> None:
    assert set(ROUTES) == {route.value for route in Route}
    assert not set(ROUTES) & set(REVIEW["never"])
    assert REVIEW["version"] == ".".join(map(str, REVIEWED))


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("path", [path for path in REVIEW["never"] if path not in ("/readyz", "/docs")])
async def test_a_workers_other_paths_are_nobodys(fortress: Fortress, path: str) -> None:
    """Whatever the method, it is the gateway that says so, and no worker is asked."""
    real = path.replace("{response_id}", "resp_1")
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        answer = await fortress.gateway.http.request(method, real, json={"model": "m"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert answer.json()["error"]["message"] == f"Unknown request URL: {method} {real}."
    assert real not in {*fortress.worker.probes, *(received.request.path for received in fortress.worker.requests)}


@pytest.mark.vllm
def test_the_review_covers_the_installed_vllm() -> None:
    """Fails when vLLM has a field or a path that nobody has looked at. Needs its environment, starts no engine."""
    python = Home.at(None, os.environ).environment("worker-cpu") / "bin" / "python"
    assert python.exists(), f"no vLLM at {python}: run `make up` once"
    ran = subprocess.run([str(python), str(HERE / "surface.py")], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["version"].startswith(REVIEW["version"])
    for route, review in ROUTES.items():
        offered = {name for model in review["models"] for name in found["fields"][model]}
        reviewed = {name for kind in ("refused", "removed", "judged", "passed") for name in review[kind]}
        assert offered - reviewed == set(), f"not reviewed, {route}"
        assert reviewed - offered == set(), f"gone, {route}"
    listed = {*ROUTES, *REVIEW["asked"], *REVIEW["never"]}
    assert set(found["paths"]) - listed == set(), "paths that were not reviewed"
