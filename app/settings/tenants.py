"""Who may use the gateway, and how much."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, field_validator, model_validator

from app.settings.part import TENANT_NAME, BandName, Part, PolicyName


class Auth(Part):
    """API keys: from files, and from Redis where there is one.

    `secret` is what digests of keys and cache salts are made with, the same on all replicas; better in a file or in
    the environment (`SLUICE_AUTH__SECRET`) than in the configuration. Another secret makes all keys unknown.
    """

    enabled: bool | None = Field(None, description="left out: unless all listeners are on loopback")
    key_files: tuple[Path, ...] = Field((), description="YAML files of keys, read again when they change")
    secret: SecretStr | None = Field(None, description="see above; empty: digests without a key")
    secret_file: Path | None = Field(None, description="holds the secret")
    stale_s: float = Field(86_400, ge=0, description="how long known keys work while their store is out of reach")
    failures_per_min: int = Field(120, ge=1, le=1_000_000, description="wrong keys of one address, before it gets 429")

    @model_validator(mode="after")
    def _has_one_secret(self) -> Auth:
        if self.secret is not None and self.secret_file is not None:
            raise ValueError("secret and secret_file are both given")
        return self


class TenantLimits(Part):
    """What a tenant may use, over all replicas; left out, there is no limit."""

    requests_per_min: int | None = Field(None, ge=1, description="in any minute")
    tokens_per_min: int | None = Field(None, ge=1, description="input and output together")
    input_tokens_per_min: int | None = Field(None, ge=1, description="of prompts")
    output_tokens_per_min: int | None = Field(None, ge=1, description="of answers")
    tokens_per_day: int | None = Field(None, ge=1, description="input and output together")
    concurrent: int | None = Field(None, ge=1, description="requests that wait or run at once")


class TenantTerms(Part):
    """What a tenant gets."""

    weight: float = Field(1, gt=0, le=1_000_000, description="its share beside other tenants'")
    ceiling: BandName = Field("priority", description="the highest band it gets, whatever `service_tier` asks for")
    models: frozenset[str] | None = Field(
        None, description="models (`m`) and variants (`m:v`) that it may use; left out: all"
    )
    limits: TenantLimits = TenantLimits()
    max_tokens: int | None = Field(None, ge=1, description="the most that one request may ask for")
    engine_fields: bool = Field(False, description="pass fields on that steer the engine itself")
    resume: bool | None = Field(
        None, description="go on with a broken stream on another worker; left out: as its model says"
    )
    degrade: bool = Field(False, description="may be served by a lesser variant under pressure")
    policy: PolicyName | None = Field(None, description="among a model's variants; left out: as the model says")


class Tenant(TenantTerms):
    """Who pays."""

    name: str = Field(description="as keys are made for it; `default_tenant` has none")

    @field_validator("name")
    @classmethod
    def _is_tenant_name(cls, name: str) -> str:
        if not TENANT_NAME.match(name):
            raise ValueError("a tenant's name has letters, digits and . _ - only, 64 at most")
        return name
