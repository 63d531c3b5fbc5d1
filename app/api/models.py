"""`GET /v1/models`: every public name, models and variants."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from fastapi import APIRouter

from app.api.dependencies import RuntimeOf, TenantOf
from app.api.schemas import ModelList, ModelObject
from app.catalogue import Model, Variant
from app.errors import ModelNotFound
from app.runtime import Runtime
from app.settings import Lifetime
from app.tenant import Tenant

routes = APIRouter(tags=["models"])


@routes.get("/v1/models", summary="The models and variants that can be asked for")
async def list_models(runtime: RuntimeOf, tenant: TenantOf) -> ModelList:
    return ModelList(data=list(_objects(runtime, tenant)))


@routes.get("/v1/models/{name:path}", summary="One model or variant")
async def one_model(name: str, runtime: RuntimeOf, tenant: TenantOf) -> ModelObject:
    for model in _objects(runtime, tenant):
        if model.id == name:
            return model
    raise ModelNotFound(f"The model {name[:200]!r} does not exist or you do not have access to it.", param="model")


def _objects(runtime: Runtime, tenant: Tenant) -> Iterator[ModelObject]:
    for model in runtime.catalogue.models:
        variants = tuple(variant for variant in model.variants if tenant.may_use(variant.model, variant.name))
        if not variants or _is_over(model.choosing):
            continue
        shown = _model(model, variants, runtime)
        objects = {shown.id: shown, **{variant.public_name: _variant(variant, runtime) for variant in variants}}
        yield from objects.values()
        for alias in model.choosing.aliases:
            same = objects.get(f"{model.name}:{alias.variant}" if alias.variant else model.name)
            if same is not None and not _is_over(alias):
                told = {"id": alias.name, "alias_of": same.id, "aliases": None}
                yield same.model_copy(update={**told, "deprecated": alias.deprecated, "sunset": alias.sunset})


def _is_over(name: Lifetime) -> bool:
    return name.sunset is not None and name.sunset <= datetime.now(UTC)


def _model(model: Model, variants: tuple[Variant, ...], runtime: Runtime) -> ModelObject:
    lengths = [length for variant in variants if (length := _context_length(variant, runtime)) is not None]
    return ModelObject(
        id=model.name,
        created=int(runtime.started),
        max_model_len=min(lengths, default=None),
        aliases=[alias.name for alias in model.choosing.aliases if not _is_over(alias)] or None,
        deprecated=model.choosing.deprecated,
        sunset=model.choosing.sunset,
        variants=[variant.public_name for variant in variants],
        ready=any(worker.is_ready for worker in runtime.registry.pool(variants)),
    )


def _variant(variant: Variant, runtime: Runtime) -> ModelObject:
    return ModelObject(
        id=variant.public_name,
        created=int(runtime.started),
        parent=variant.model,
        variant=variant.name,
        quantization=variant.quantization,
        max_model_len=_context_length(variant, runtime),
        card=variant.card.public if variant.card else None,
        ready=any(worker.is_ready for worker in runtime.registry.pool((variant,))),
    )


def _context_length(variant: Variant, runtime: Runtime) -> int | None:
    """Tokens: what every worker of the pool can take, or what the manifest says before any has answered."""
    lengths = [w.context_length for w in runtime.registry.pool((variant,)) if w.context_length is not None]
    return min(lengths, default=variant.context_length)
