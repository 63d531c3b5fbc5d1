"""Settings: one YAML file, single values overridden by `SLUICE_…` environment variables.

Frozen and nested, one part per package, units in the names. `SLUICE_LISTEN__PORT=9000` overrides `listen.port`.
An unknown key is an error: a limit that is misspelt must not silently be absent.
"""

from app.settings.batches import Batches, Bucket
from app.settings.loading import CONFIG_FILE_MAX_BYTES, load_settings
from app.settings.models import Alias, Canary, Cascade, Choosing, Lifetime, Model, QualityGate, Shadow, Variant, Worker
from app.settings.network import Admin, Listen, Tls, WorkerTls, is_loopback
from app.settings.operation import Logs, Reload, Tracing
from app.settings.part import NAME, TENANT_NAME, VARIANT_NAME, BandName, Part, PolicyName
from app.settings.redis import Redis, Sentinel
from app.settings.requests import Limits, Media, Parameters, Structured
from app.settings.serving import Admission, Health, Relay, Routing
from app.settings.tenants import Auth, Tenant, TenantLimits, TenantTerms
from app.settings.whole import Settings

__all__ = [
    "Admin",
    "Admission",
    "Alias",
    "Auth",
    "BandName",
    "Batches",
    "Bucket",
    "CONFIG_FILE_MAX_BYTES",
    "Canary",
    "Cascade",
    "Choosing",
    "Health",
    "Lifetime",
    "Limits",
    "Listen",
    "Logs",
    "Media",
    "Model",
    "NAME",
    "Parameters",
    "Part",
    "PolicyName",
    "QualityGate",
    "Redis",
    "Relay",
    "Reload",
    "Routing",
    "Sentinel",
    "Settings",
    "Shadow",
    "Structured",
    "TENANT_NAME",
    "Tenant",
    "TenantLimits",
    "TenantTerms",
    "Tls",
    "Tracing",
    "VARIANT_NAME",
    "Variant",
    "Worker",
    "WorkerTls",
    "is_loopback",
    "load_settings",
]
