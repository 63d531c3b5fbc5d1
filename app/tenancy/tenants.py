"""The tenants that the settings name, and the terms for all others. Pure."""

from __future__ import annotations

from collections import OrderedDict

from app import settings
from app.tenant import ANONYMOUS, Band, Limits, Tenant

STRANGERS = 4096


class Tenants:
    """Tenants by name. Those that the settings do not name share the default terms, each under its own name.

    Of these at most STRANGERS are kept, the latest ones: their names come from outside.
    """

    def __init__(self, named: tuple[settings.Tenant, ...], default: settings.TenantTerms) -> None:
        self._default = default
        self._named = {tenant.name: tenant_of(tenant.name, tenant) for tenant in named}
        self._strangers: OrderedDict[str, Tenant] = OrderedDict()
        self.anonymous = self.get(ANONYMOUS.name)

    def get(self, name: str) -> Tenant:
        found = self._named.get(name) or self._strangers.get(name)
        if found is None:
            found = self._strangers[name] = tenant_of(name, self._default)
            if len(self._strangers) > STRANGERS:
                self._strangers.popitem(last=False)
        return found


def tenant_of(name: str, terms: settings.TenantTerms) -> Tenant:
    return Tenant(
        name=name,
        weight=terms.weight,
        ceiling=Band(terms.ceiling),
        models=terms.models,
        limits=Limits(**terms.limits.model_dump()),
        max_tokens=terms.max_tokens,
        engine_fields=terms.engine_fields,
        resume=terms.resume,
        degrade=terms.degrade,
    )
