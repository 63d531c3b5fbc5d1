"""The whole configuration."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from app.settings.batches import Batches
from app.settings.models import Model
from app.settings.network import Admin, Listen, is_loopback
from app.settings.operation import Logs, Reload, Tracing
from app.settings.redis import Redis
from app.settings.requests import Limits, Parameters
from app.settings.serving import Admission, Health, Relay, Routing
from app.settings.tenants import Auth, Tenant, TenantTerms


class Settings(BaseSettings):
    """The whole configuration of one gateway."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="SLUICE_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    listen: Listen = Listen()
    admin: Admin | None = None
    redis: Redis | None = None
    auth: Auth = Auth()
    models: tuple[Model, ...] = ()
    tenants: tuple[Tenant, ...] = ()
    default_tenant: TenantTerms = Field(TenantTerms(), description="the terms of all whom `tenants` does not name")
    admission: Admission = Admission()
    routing: Routing = Routing()
    relay: Relay = Relay()
    limits: Limits = Limits()
    parameters: Parameters = Parameters()
    health: Health = Health()
    batches: Batches = Batches()
    reload: Reload = Reload()
    logs: Logs = Logs()
    tracing: Tracing | None = None
    drain_notice_s: float = Field(
        5, ge=0, le=600, description="after SIGTERM: unready, but still accepting, until load balancers have noticed"
    )
    drain_queue_s: float = Field(20, ge=0, le=3600, description="after SIGTERM: time for those who wait to get a slot")
    drain_timeout_s: float = Field(30, ge=0, le=3600, description="after SIGTERM: time for open requests to finish")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The file arrives as init values; the environment overrides single values of it.
        return env_settings, init_settings

    @model_validator(mode="after")
    def _is_consistent(self) -> Settings:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("a model is listed twice")
        self._check_names(set(names))
        variants = [variant for model in self.models for variant in model.variants]
        places = [worker.dns or worker.authority for variant in variants for worker in variant.workers]
        if len(set(places)) != len(places):
            raise ValueError("a worker's url is listed twice")
        keeps_batches = self.batches.directory is not None or self.batches.bucket is not None
        if keeps_batches and self.redis is None and self.listen.processes > 1:
            raise ValueError("batches: several processes need redis to share the work")
        if len({tenant.name for tenant in self.tenants}) != len(self.tenants):
            raise ValueError("a tenant is listed twice")
        return self

    def _check_names(self, models: set[str]) -> None:
        """A name means one thing, and a fallback is another model."""
        known = models | {f"{model.name}:{variant.name}" for model in self.models for variant in model.variants}
        for model in self.models:
            for alias in model.aliases:
                if alias.name in known:
                    raise ValueError(f"the alias {alias.name!r} is a name already")
                known.add(alias.name)
            for name in model.fallbacks:
                if name == model.name or name not in models:
                    raise ValueError(f"the fallback {name!r} of model {model.name!r} is not another model")

    @property
    def is_guarded(self) -> bool:
        """Whether keys are asked for: as configured, and otherwise unless all listeners are on loopback."""
        if self.auth.enabled is not None:
            return self.auth.enabled
        hosts = [self.listen.host, *([self.admin.host] if self.admin else [])]
        return not all(is_loopback(host) for host in hosts)
