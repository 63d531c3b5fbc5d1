"""What a public name resolves to: models, their variants, and each variant's manifest.

`smollm2` means any variant of the model, `smollm2:w8a8` pins one. What is in a catalogue is immutable; a reload builds
another, and the one that everybody holds adopts its content in a single step.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app import settings
from app.card import Card
from app.credentials import TlsContexts, read_secret
from app.errors import ConfigurationError, ModelNotFound
from app.tenant import ANONYMOUS, Tenant

MANIFEST_FILE = "sluice.json"
SHOWN_NAME_CHARS = 200


class Manifest(BaseModel):
    """How a variant was made, written as `sluice.json` beside its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="public name of the model")
    variant: str
    base: str = Field(description="what the recipe started from: a package, a hub id or a path's last part")
    recipe: str
    parameters: dict[str, Any] = Field(default_factory=dict, description="the recipe's parameters")
    libraries: dict[str, str] = Field(default_factory=dict, description="distribution name to version")
    weights_bytes: int = Field(ge=0)
    parameters_count: int = Field(ge=0)
    quantization: str | None = None
    context_length: int | None = Field(None, ge=1, description="tokens")
    calibration_sha256: str | None = None
    card: Card | None = Field(None, description="what `sluice evaluate` measured")

    def write(self, directory: Path) -> None:
        (directory / MANIFEST_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest in `directory`. Raises ConfigurationError when it is missing or does not fit the schema."""
        path = directory / MANIFEST_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror or error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigurationError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where a worker of a variant listens, what it calls the model, and how many slots it has, at most if it adapts.

    `tls` is None for plain HTTP. `api_key` is the worker's own and goes nowhere else; empty for none.
    """

    id: str
    host: str
    port: int
    served_model: str
    slots: int
    adapts: bool = False
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    server_name: str | None = None
    api_key: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://{self.id}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One form of a model, with the workers of its pool. `resumes`: its broken streams may go on on another of them."""

    model: str
    name: str
    workers: tuple[WorkerAddress, ...]
    quantization: str | None = None
    context_length: int | None = None
    resumes: bool = False

    @property
    def public_name(self) -> str:
        return f"{self.model}:{self.name}"


@dataclass(frozen=True, slots=True)
class Model:
    """What clients ask for; the order of its variants is the operator's preference."""

    name: str
    variants: tuple[Variant, ...]


class Catalogue:
    """Every public name and what stands behind it."""

    def __init__(self, models: tuple[Model, ...]) -> None:
        self.models = models
        self._by_name: dict[str, tuple[Variant, ...]] = {}
        for model in models:
            self._by_name[model.name] = model.variants
            for variant in model.variants:
                self._by_name[variant.public_name] = (variant,)

    @classmethod
    def of(cls, configured: tuple[settings.Model, ...]) -> Catalogue:
        """The catalogue of a configuration.

        Raises ConfigurationError for a manifest, certificate or key that cannot be read.
        """
        contexts = TlsContexts()
        return cls(tuple(_model(model, contexts) for model in configured))

    def adopt(self, other: Catalogue) -> None:
        """Have the content of `other`. Requests under way keep the variants that they were given."""
        vars(self).update(vars(other))

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(variant for model in self.models for variant in model.variants)

    def resolve(self, name: str, tenant: Tenant = ANONYMOUS) -> tuple[Variant, ...]:
        """The variants that may serve `name` to `tenant`, in the operator's order.

        Raises ModelNotFound: what a tenant may not use does not exist for it.
        """
        found = self._by_name.get(name, ())
        if tenant.models is not None:
            found = tuple(variant for variant in found if tenant.may_use(variant.model, variant.name))
        if not found:
            shown = name[:SHOWN_NAME_CHARS]
            raise ModelNotFound(f"The model {shown!r} does not exist or you do not have access to it.", param="model")
        return found


def _model(configured: settings.Model, contexts: TlsContexts) -> Model:
    return Model(configured.name, tuple(_variant(configured, variant, contexts) for variant in configured.variants))


def _variant(model: settings.Model, configured: settings.Variant, contexts: TlsContexts) -> Variant:
    manifest = Manifest.read(configured.manifest.parent) if configured.manifest else None
    return Variant(
        model=model.name,
        name=configured.name,
        workers=tuple(_worker(f"{model.name}:{configured.name}", worker, contexts) for worker in configured.workers),
        quantization=configured.quantization or (manifest.quantization if manifest else None),
        context_length=manifest.context_length if manifest else None,
        resumes=model.resume,
    )


def _worker(public_name: str, configured: settings.Worker, contexts: TlsContexts) -> WorkerAddress:
    authority, is_tls = configured.authority, configured.url.startswith("https://")
    default_port = "443" if is_tls else "80"
    host, _, port = authority.rpartition(":") if ":" in authority.rpartition("]")[2] else (authority, "", default_port)
    tls = configured.tls or settings.WorkerTls()
    return WorkerAddress(
        id=authority,
        host=host.strip("[]"),
        port=int(port),
        served_model=configured.served_model or public_name,
        slots=configured.most_slots,
        adapts=configured.max_concurrency == "auto",
        tls=contexts.of(tls) if is_tls else None,
        server_name=tls.server_name,
        api_key=read_secret(configured.api_key_file, configured.api_key_env),
    )
