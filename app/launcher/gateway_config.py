"""The configuration that `sluice up` gives the gateway: what it started itself, and what the user's file adds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ServedWorker:
    """A worker as the gateway is told of it; `slots` None leaves the gateway's default."""

    model: str
    variant: str
    url: str
    served_model: str
    slots: int | None = None
    quantization: str | None = None
    manifest: Path | None = None


def gateway_config(
    user: Mapping[str, Any],
    workers: Sequence[ServedWorker],
    redis_url: str | None,
    key_file: Path | None = None,
    batches: Path | None = None,
) -> dict[str, Any]:
    """The user's values, with our models before the user's, our Valkey and our keys where there are any, and a place
    for batches where the user names none.

    No load balancer stands in front of `sluice up` that would have to notice its end.
    """
    redis = {"redis": {"url": redis_url}} if redis_url else {}
    auth = {"auth": {**(user.get("auth") or {}), "key_files": [str(key_file)]}} if key_file else {}
    kept = {"batches": {"directory": str(batches), **(user.get("batches") or {})}} if batches else {}
    models = [*_models(workers), *(user.get("models") or [])]
    return {"drain_notice_s": 0, **user, **redis, **auth, **kept, "models": models}


def _models(workers: Sequence[ServedWorker]) -> list[dict[str, Any]]:
    models: dict[str, dict[str, list[ServedWorker]]] = {}
    for worker in workers:
        models.setdefault(worker.model, {}).setdefault(worker.variant, []).append(worker)
    return [
        {"name": model, "variants": [_variant(name, pool) for name, pool in variants.items()]}
        for model, variants in models.items()
    ]


def _variant(name: str, pool: Sequence[ServedWorker]) -> dict[str, Any]:
    first = pool[0]
    variant: dict[str, Any] = {"name": name, "workers": [_worker(worker) for worker in pool]}
    if first.quantization:
        variant["quantization"] = first.quantization
    if first.manifest:
        variant["manifest"] = str(first.manifest)
    return variant


def _worker(worker: ServedWorker) -> dict[str, Any]:
    entry: dict[str, Any] = {"url": worker.url, "served_model": worker.served_model}
    if worker.slots:
        entry["max_concurrency"] = worker.slots
    return entry
