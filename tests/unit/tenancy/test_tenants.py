"""Tenants: their terms, and the terms of all others."""

from __future__ import annotations

import pytest

from app import settings
from app.catalogue import Catalogue
from app.errors import ModelNotFound
from app.tenancy.tenants import STRANGERS, Tenants
from app.tenant import Band, Limits

ACME = settings.Tenant(
    name="acme",
    weight=2,
    ceiling="flex",
    models=frozenset({"small", "big:dense"}),
    limits=settings.TenantLimits(requests_per_min=5, tokens_per_day=7),
    max_tokens=9,
    resume=True,
)


def models(*names: str) -> Catalogue:
    variants = [
        settings.Variant(name=name, workers=(settings.Worker(url=f"http://h:{port}"),))
        for port, name in ((1, "dense"), (2, "w8a8"))
    ]
    return Catalogue.of(tuple(settings.Model(name=name, variants=tuple(variants)) for name in names))


def test_a_tenant_has_the_terms_of_the_settings() -> None:
    tenants = Tenants((ACME,), settings.TenantTerms(weight=3))
    acme = tenants.get("acme")
    assert acme is tenants.get("acme")
    assert (acme.name, acme.weight, acme.ceiling, acme.max_tokens, acme.resume) == ("acme", 2, Band.FLEX, 9, True)
    assert acme.limits == Limits(requests_per_min=5, tokens_per_day=7)
    assert (tenants.get("else").weight, tenants.anonymous.weight) == (3, 3)
    assert tenants.anonymous.is_anonymous
    assert not acme.is_anonymous


def test_who_is_not_named_is_kept_apart_and_not_for_ever() -> None:
    tenants = Tenants((ACME,), settings.TenantTerms())
    for number in range(STRANGERS + 10):
        assert tenants.get(f"s{number}").name == f"s{number}"
    assert len(tenants._strangers) == STRANGERS


def test_each_tenant_has_a_salt_of_its_own_and_nobody_none() -> None:
    found = [Tenants((ACME,), settings.TenantTerms(), secret) for secret in (b"", b"one", b"two")]
    salts = {tenants.get(name).cache_salt for tenants in found for name in ("acme", "else")}
    assert len(salts) == 6
    assert "" not in salts
    assert {tenants.anonymous.cache_salt for tenants in found} == {""}
    assert Tenants((), settings.TenantTerms(), b"one").get("acme").cache_salt == found[1].get("acme").cache_salt


@pytest.mark.parametrize(
    ("name", "variants"),
    [("small", ["dense", "w8a8"]), ("small:w8a8", ["w8a8"]), ("big", ["dense"]), ("big:dense", ["dense"])],
)
def test_a_models_name_means_those_of_its_variants_that_one_may_use(name: str, variants: list[str]) -> None:
    acme = Tenants((ACME,), settings.TenantTerms()).get("acme")
    assert [variant.name for variant in models("small", "big").resolve(name, acme)] == variants


@pytest.mark.parametrize("name", ["big:w8a8", "huge", "huge:dense", "none"])
def test_what_one_may_not_use_does_not_exist(name: str) -> None:
    catalogue = models("small", "big", "huge")
    tenants = Tenants((ACME,), settings.TenantTerms())
    with pytest.raises(ModelNotFound) as hidden:
        catalogue.resolve(name, tenants.get("acme"))
    with pytest.raises(ModelNotFound) as unknown:
        models("small").resolve(name, tenants.anonymous)
    assert hidden.value.as_object() == unknown.value.as_object()


def test_a_change_is_one_of_all_tenants_at_once() -> None:
    other = settings.Tenant(name="other", limits=settings.TenantLimits(concurrent=1))
    tenants = Tenants((ACME, other), settings.TenantTerms(weight=3), b"secret")
    before = {name: tenants.get(name) for name in ("acme", "other", "stranger", "anonymous")}
    seen: list[tuple[list[str], float, float]] = []
    tenants.listen(lambda: seen.append((list(tenants.named), tenants.get("acme").weight, tenants.anonymous.weight)))
    more = settings.TenantLimits(requests_per_min=50)
    tenants.change((ACME.model_copy(update={"weight": 7, "limits": more}),), settings.TenantTerms(weight=4))
    assert seen == [(["acme"], 7, 4)]
    assert tenants.get("acme").limits == Limits(requests_per_min=50)
    assert [tenants.get(name).weight for name in ("other", "stranger")] == [4, 4]
    assert tenants.get("other").limits.is_unlimited
    assert {name: tenants.get(name).cache_salt for name in before} == {
        name: tenant.cache_salt for name, tenant in before.items()
    }
    # A request keeps the terms that it came under.
    assert (before["acme"].weight, before["acme"].limits.requests_per_min) == (2, 5)


def test_a_change_that_cannot_be_made_leaves_the_old_terms() -> None:
    tenants = Tenants((ACME,), settings.TenantTerms())
    broken = ACME.model_copy(update={"ceiling": "highest", "weight": 7})
    with pytest.raises(ValueError, match="highest"):
        tenants.change((settings.Tenant(name="new"), broken), settings.TenantTerms(weight=4))
    assert (list(tenants.named), tenants.get("acme").weight, tenants.get("new").weight) == (["acme"], 2, 1)
