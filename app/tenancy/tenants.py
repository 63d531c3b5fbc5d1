"""The tenants that the settings name, and the terms for all others. Pure."""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Callable, Sequence

from app import settings
from app.inference import cache_salt
from app.preference import Policy
from app.tenant import ANONYMOUS, Band, Limits, Tenant

STRANGERS = 4096


class Tenants:
    """Tenants by name. Those that the settings do not name share the default terms, each under its own name.

    Of these at most STRANGERS are kept, the latest ones: their names come from outside.
    """

    def __init__(self, named: Sequence[settings.Tenant], default: settings.TenantTerms, secret: bytes = b"") -> None:
        self._secret = hmac.digest(secret, b"sluice cache salts", "sha256")
        self._listeners: list[Callable[[], None]] = []
        self.change(named, default)

    @property
    def named(self) -> Sequence[str]:
        """The names that the settings have, in their order."""
        return list(self._named)

    @property
    def anonymous(self) -> Tenant:
        return self.get(ANONYMOUS.name)

    def get(self, name: str) -> Tenant:
        found = self._named.get(name) or self._strangers.get(name)
        if found is None:
            found = self._strangers[name] = tenant_of(name, self._default, self._secret)
            if len(self._strangers) > STRANGERS:
                self._strangers.popitem(last=False)
        return found

    def weight_of(self, name: str) -> float:
        return self.get(name).weight

    def change(self, named: Sequence[settings.Tenant], default: settings.TenantTerms) -> None:
        """These terms hold from now on, for all tenants at once; a request keeps those it came under.

        What tenants have used of their limits stays used. Cache salts stay the same. Nothing waits in here, so nobody
        sees one tenant's new terms beside another's old ones.
        """
        self._named = {tenant.name: tenant_of(tenant.name, tenant, self._secret) for tenant in named}
        self._default = default
        self._strangers: OrderedDict[str, Tenant] = OrderedDict()
        for changed in self._listeners:
            changed()

    def listen(self, changed: Callable[[], None]) -> None:
        """Call this after each change."""
        self._listeners.append(changed)


def tenant_of(name: str, terms: settings.TenantTerms, secret: bytes) -> Tenant:
    """Those without a name share one cache: they are not known to be more than one."""
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
        policy=Policy(terms.policy) if terms.policy else None,
        cache_salt="" if name == ANONYMOUS.name else cache_salt(secret, name),
    )
