"""Prints, as JSON, what a vLLM takes from clients: fields of its request models and paths of its server.

Runs in vLLM's own environment, and needs nothing of this repository. Models are imported, paths are read from
the source, as building the server needs an engine.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path

ROUTE = re.compile(
    r"(?:@\w*(?:router|app)\.(?:get|post|put|delete|patch|head|websocket|api_route)"
    r"|\.add_api_route|\.mount|\bMount)\(\s*\"(/[^\"]*)\""
)


def surface() -> dict[str, object]:
    """The version, and what of it a client can reach. Raises ImportError where there is no vLLM."""
    import vllm
    import vllm.entrypoints as entrypoints

    fields: dict[str, list[str]] = {}
    for module in pkgutil.walk_packages(entrypoints.__path__, "vllm.entrypoints."):
        if module.name.endswith(".protocol"):
            _collect(module.name, fields)
    sources = [source for place in entrypoints.__path__ for source in Path(place).rglob("*.py")]
    paths = {path for source in sources for path in ROUTE.findall(source.read_text(encoding="utf-8"))}
    return {"version": vllm.__version__, "fields": fields, "paths": sorted(paths)}


def _collect(module_name: str, fields: dict[str, list[str]]) -> None:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:  # of a part that this build leaves out
        return
    for name, value in vars(module).items():
        known = getattr(value, "model_fields", None)
        if name.endswith("Request") and known and value.__module__ == module_name:
            fields[f"{module_name.removeprefix('vllm.entrypoints.')}.{name}"] = sorted(known)


if __name__ == "__main__":
    json.dump(surface(), sys.stdout)
