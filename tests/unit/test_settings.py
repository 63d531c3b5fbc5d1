"""Settings: the documented shape, overrides, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.catalogue import Catalogue, VariantFacts
from app.credentials import server_secret
from app.errors import ConfigurationError, ModelNotFound
from app.manifest import Manifest
from app.settings import is_loopback, load_settings
from tests.unit.cards import card, quality

DOCUMENTED = """
listen: {host: 127.0.0.1, port: 8000, processes: 1}
admin: {host: 127.0.0.1, port: 8001}
redis: {url: redis://127.0.0.1:6379/0}
auth: {enabled: false}
models:
  - name: smollm2
    policy: balanced
    variants:
      - name: dense
        workers: [{url: http://127.0.0.1:9001, served_model: smollm2-dense, max_concurrency: 8}]
      - name: w8a8
        workers: [{url: http://127.0.0.1:9002, served_model: smollm2-w8a8}]
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "sluice.yaml"
    path.write_text(text)
    return path


def test_the_documented_shape(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, DOCUMENTED))
    catalogue = Catalogue.of(settings.models)
    both = catalogue.resolve("smollm2")
    assert [variant.public_name for variant in both] == ["smollm2:dense", "smollm2:w8a8"]
    assert catalogue.resolve("smollm2:w8a8") == (both[1],)
    worker = both[0].workers[0]
    assert (worker.id, worker.host, worker.port, worker.served_model, worker.slots) == (
        "127.0.0.1:9001", "127.0.0.1", 9001, "smollm2-dense", 8,
    )  # fmt: skip


def test_a_worker_serves_the_public_name_unless_it_says_otherwise(tmp_path: Path) -> None:
    text = "models: [{name: m, variants: [{name: v, workers: [{url: 'http://[::1]:7'}]}]}]"
    (variant,) = Catalogue.of(load_settings(write(tmp_path, text)).models).resolve("m")
    assert (variant.workers[0].served_model, variant.workers[0].host, variant.workers[0].port) == ("m:v", "::1", 7)


@pytest.mark.parametrize("name", ["smollm", "smollm2:", "smollm2:none", "", "../etc", "x" * 10_000])
def test_an_unknown_name(tmp_path: Path, name: str) -> None:
    catalogue = Catalogue.of(load_settings(write(tmp_path, DOCUMENTED)).models)
    with pytest.raises(ModelNotFound) as caught:
        catalogue.resolve(name)
    assert len(caught.value.message) < 400


def test_environment_over_file_over_defaults_and_arguments_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, DOCUMENTED)
    monkeypatch.setenv("SLUICE_LISTEN__PORT", "9000")
    monkeypatch.setenv("SLUICE_RELAY__GAP_TIMEOUT_S", "7")
    monkeypatch.setenv("SLUICE_HOME", "/somewhere")
    settings = load_settings(path, processes=2)
    assert (settings.listen.host, settings.listen.port, settings.listen.processes) == ("127.0.0.1", 9000, 2)
    assert settings.relay.gap_timeout_s == 7
    assert load_settings(path, port=1).listen.port == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("listen: {prot: 1}", "listen.prot: unknown key"),
        ("bogus: 1", "bogus: unknown key"),
        ("listen: {port: 99999}", "listen.port: "),
        ("listen: [", "not YAML"),
        ("- a", "a mapping"),
        ("", "a mapping"),
        ("models: [{name: m, variants: []}]", "models.0.variants: "),
        (
            "models: [{name: 'a b', variants: [{name: v, workers: [{url: 'http://h:1'}]}]}]",
            "models.0.name: a model's name",
        ),
        (
            "models: [{name: m, variants: [{name: v, workers: [{url: 'ftp://h'}]}]}]",
            "models.0.variants.0.workers.0.url",
        ),
        ("models: [{name: m, variants: [{name: v, workers: [{url: 'http://h:1/v1'}]}]}]", "http://HOST:PORT"),
        ("auth: {enabled: true}\nadmission: {trust_tenant_header: true}", "admission.trust_tenant_header: "),
        ("auth: {secret: x, secret_file: y}", "auth: secret and secret_file"),
        ("admin: {port: 8000}", "admin.port: "),
        ("tenants: [{name: a}, {name: a}]", "a tenant is listed twice"),
        ("tenants: [{name: 'a b'}]", "tenants.0.name: a tenant's name"),
        ("tenants: [{name: a, limits: {tokens: 5}}]", "tenants.0.limits.tokens: unknown key"),
        ("tenants: [{name: a, ceiling: urgent}]", "tenants.0.ceiling: "),
    ],
)
def test_a_mistake_is_one_line_with_the_file_and_the_key(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load_settings(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert told in message
    assert "\n" not in message


TWO = "variants: [{name: a, workers: [{url: 'http://h:1'}]}, {name: b, workers: [{url: 'http://h:2'}]}]"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("policy: best", "models.0.policy: "),
        ("policy: cascade", "has the policy cascade and no cascade"),
        ("quality_floor: 2", "models.0.quality_floor: "),
        ("canary: {variant: c, percent: 5}", "has no variant 'c'"),
        ("canary: {variant: b, percent: 101}", "models.0.canary.percent: "),
        ("shadow: {variant: c}", "has no variant 'c'"),
        ("cascade: {small: a, large: a}", "small and large are the same"),
        ("cascade: {small: a, large: c}", "has no variant 'c'"),
        ("aliases: [{name: x, variant: c}]", "has no variant 'c'"),
        ("aliases: [x, x]", "the alias 'x' is a name already"),
        ("aliases: ['m:a']", "models.0.aliases.0.name: "),
        ("aliases: [m]", "the alias 'm' is a name already"),
        ("aliases: [' x']", "models.0.aliases.0.name: "),
        ("fallbacks: [m]", "is not another model"),
        ("fallbacks: [n]", "is not another model"),
        ("deprecated: 2026-02-01, sunset: 2026-01-01", "sunset is before deprecated"),
        ("sunset: soon", "models.0.sunset: "),
    ],
)
def test_a_mistake_in_how_variants_are_chosen(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(write(tmp_path, f"models: [{{name: m, {TWO}, {text}}}]"))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cascade_needs_a_threshold_or_a_card(tmp_path: Path) -> None:
    text = f"models: [{{name: m, {TWO}, cascade: {{small: a, large: b}}}}]"
    with pytest.raises(ConfigurationError, match="no threshold"):
        Catalogue.of(load_settings(write(tmp_path, text)).models)


def test_a_card_tells_what_is_chosen_by(tmp_path: Path) -> None:
    step = {"escalated_share": 0.3, "agreement": 0.9}
    table = [{"threshold": 0.4, "expected_quality": 0.99, **step}, {"threshold": 0.8, "expected_quality": 0.9, **step}]
    unsure = {"measure": "margin", "window_tokens": 4, "top_logprobs": 3, "items": 9, "table": table}
    cost = {"per_million_tokens": 0.5, "machine_price_per_hour": 1, "streams": 8}
    speed = {"streams": 1, "ttft_p50_s": 0.2, "itl_p50_s": 0.1, "tokens_per_s": 10}
    made = Manifest(
        model="m",
        variant="a",
        base="b",
        recipe="r",
        weights_bytes=1,
        parameters_count=1,
        card=card(quality(0.9), uncertainty=[unsure], cost=cost, speed=[speed]),
    )
    made.write(tmp_path)
    variants = (
        f"[{{name: a, manifest: {tmp_path / 'sluice.json'}, workers: [{{url: 'http://h:1'}}]}},"
        " {name: b, quality: 1, cost: 2, workers: [{url: 'http://h:2'}]}]"
    )
    text = f"models: [{{name: m, variants: {variants}, cascade: {{small: a, large: b, measure: margin}}}}]"
    (model,) = Catalogue.of(load_settings(write(tmp_path, text)).models).models
    assert [variant.facts for variant in model.variants] == [
        VariantFacts(quality=0.9, cost=0.25, ttft_s=0.2),
        VariantFacts(quality=1.0, cost=1.0),
    ]
    assert model.cascade is not None
    assert (model.cascade.threshold, model.cascade.calibrated.window_tokens) == (0.4, 4)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("h", False)]
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_manifest_survives_being_written(tmp_path: Path) -> None:
    manifest = Manifest(
        model="m", variant="w8a8", base="b", recipe="w8a8", weights_bytes=1, parameters_count=2, quantization="w8a8"
    )
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


@pytest.mark.parametrize("text", ["{", "{}", '{"model": 1}'])
def test_a_manifest_that_does_not_fit_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sluice.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"sluice\.json"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "is_guarded", "admin"),
    [
        ("listen: {host: 127.0.0.1}", False, None),
        ("listen: {host: localhost}", False, None),
        ("listen: {host: '::1'}", False, None),
        ("listen: {host: 0.0.0.0}", True, "127.0.0.1"),
        ("listen: {host: 0.0.0.0}\nadmin: {host: 10.0.0.1}", True, "10.0.0.1"),
        ("listen: {host: gateway.example}", True, "127.0.0.1"),
        ("admin: {host: 0.0.0.0}", True, "0.0.0.0"),
        ("listen: {host: 0.0.0.0}\nauth: {enabled: false}", False, "127.0.0.1"),
        ("auth: {enabled: true}", True, None),
    ],
)
def test_keys_are_asked_for_unless_everything_is_on_loopback(
    tmp_path: Path, text: str, is_guarded: bool, admin: str | None
) -> None:
    settings = load_settings(write(tmp_path, text))
    assert settings.is_guarded is is_guarded
    assert (settings.admin.host if settings.admin else None) == admin


def test_a_secret_is_read_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("parrot-of-sixteen-bytes\n")
    settings = load_settings(write(tmp_path, f"auth: {{secret_file: {secret}}}"))
    assert server_secret(settings.auth) == b"parrot-of-sixteen-bytes"
    monkeypatch.setenv("SLUICE_AUTH__SECRET", "parrot-in-the-environment")
    told = load_settings(None)
    assert server_secret(told.auth) == b"parrot-in-the-environment"
    assert "parrot" not in repr(told) + str(told.model_dump()) + told.model_dump_json()
    secret.write_text("two\nlines")
    with pytest.raises(ConfigurationError, match="one line"):
        server_secret(settings.auth)
