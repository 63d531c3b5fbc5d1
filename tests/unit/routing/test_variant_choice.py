"""The choice among variants: by policy, within floor and consent, canaries, and ladders that do not flap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import settings
from app.card import Uncertainty, UncertaintyStep
from app.catalogue import Cascade, Catalogue, Model, Offer, Variant, VariantFacts, threshold_of
from app.errors import InvalidValue, ModelNotFound
from app.preference import Policy, Preference
from app.routing.variant_choice import CALM_MAX, Choice, Ladder, Reason, Rung, Terms, choose, point_of
from app.tenant import Tenant

CALM_S = 5.0


@dataclass(frozen=True)
class Now:
    """What is known: who has no worker, how soon each begins, how far pressure has stepped down."""

    gone: frozenset[str] = frozenset()
    ttfts: dict[str, float] = field(default_factory=dict)
    open: int = 0

    def serves(self, variant: Variant) -> bool:
        return variant.name not in self.gone

    def ttft_s(self, variant: Variant) -> float:
        return self.ttfts.get(variant.name, variant.facts.ttft_s)

    def level(self, model: Model, ladder: Sequence[Rung]) -> int:
        return self.open


def variant(name: str, **facts: Any) -> Variant:
    return Variant("m", name, (), facts=VariantFacts(**facts))


DENSE = variant("dense", quality=1.0, cost=1.0)
W8A8 = variant("w8a8", quality=0.95, cost=0.6)
DEPTH = variant("depth26", quality=0.6, cost=0.8)
BAD = variant("bad", quality=0.9, cost=0.1, passes_gate=False)
MEASURED = (DENSE, W8A8, DEPTH)
CONSENTS = Tenant("a", degrade=True)
STRICT = Tenant("b")


def offer(*variants: Variant, name: str = "m", **choosing: Any) -> Offer:
    return Catalogue((Model("m", variants, settings.Choosing(**choosing)),)).offer(name)


def chosen(offered: Offer, tenant: Tenant = STRICT, now: Now | None = None, point: float = 1.0, **asked: Any) -> Choice:
    terms = Terms.of(offered.model.choosing, tenant, Preference(**asked), point)
    return choose(offered, lambda: terms, now or Now())


def names(choice: Choice) -> list[list[str]]:
    """What each step opens."""
    return [[one.name for rung in step.rungs for one in rung] for step in choice.steps]


@pytest.mark.parametrize(
    ("policy", "first"),
    [
        (Policy.QUALITY, ["dense"]),
        (Policy.ECONOMY, ["w8a8"]),
        (Policy.BALANCED, ["w8a8"]),
        (Policy.ANY, ["dense", "w8a8", "depth26"]),
        (Policy.PINNED, ["dense"]),
    ],
)
def test_policies(policy: Policy, first: list[str]) -> None:
    choice = chosen(offer(*MEASURED), policy=policy)
    assert (names(choice), choice.reason) == ([first], Reason(policy))


@pytest.mark.parametrize(("weight", "first"), [(0.0, "dense"), (0.1, "dense"), (0.2, "w8a8"), (100.0, "w8a8")])
def test_the_callers_weight_of_cost(weight: float, first: str) -> None:
    assert names(chosen(offer(*MEASURED), policy=Policy.BALANCED, cost_weight=weight)) == [[first]]


def test_what_was_never_measured_is_equal_and_worse_than_what_was() -> None:
    unknown = variant("x"), variant("y")
    assert names(chosen(offer(*unknown))) == [["x", "y"]]
    assert names(chosen(offer(*unknown, W8A8))) == [["w8a8"]]


def test_the_request_outranks_the_tenant_and_the_tenant_the_model() -> None:
    offered, thrifty = offer(*MEASURED, policy="quality"), Tenant("t", policy=Policy.ECONOMY)
    assert names(chosen(offered)) == [["dense"]]
    assert names(chosen(offered, thrifty)) == [["w8a8"]]
    assert names(chosen(offered, thrifty, policy=Policy.QUALITY)) == [["dense"]]


def test_a_name_pins_and_only_a_name_reaches_what_fails_the_gate() -> None:
    pinned = chosen(offer(DENSE, BAD, name="m:bad"), policy=Policy.QUALITY)
    assert (names(pinned), pinned.reason, pinned.is_decided) == ([["bad"]], Reason.PINNED, False)
    alone = chosen(offer(DENSE, BAD))
    assert (names(alone), alone.reason, alone.is_decided) == ([["dense"]], Reason.ONLY, False)
    with pytest.raises(ModelNotFound):
        chosen(offer(BAD))


def test_the_best_that_keeps_the_ttft() -> None:
    slow = Now(ttfts={"dense": 3.0, "w8a8": 1.0, "depth26": 2.0})
    for ttft_s, first, reason in ((5.0, "dense", "quality"), (1.5, "w8a8", "ttft"), (0.1, "w8a8", "ttft")):
        choice = chosen(offer(*MEASURED), now=slow, policy=Policy.QUALITY, ttft_s=ttft_s)
        assert (names(choice), choice.reason) == ([[first]], reason)


def test_what_has_no_worker_is_passed_over() -> None:
    choice = chosen(offer(*MEASURED), now=Now(gone=frozenset({"dense"})), policy=Policy.QUALITY)
    assert (names(choice), choice.reason) == ([["w8a8"]], Reason.UNAVAILABLE)
    nobody = Now(gone=frozenset({"dense", "w8a8", "depth26"}))
    assert names(chosen(offer(*MEASURED), now=nobody, policy=Policy.QUALITY)) == [["dense"]]


def test_consent_opens_the_ladder_step_by_step() -> None:
    choice = chosen(offer(*MEASURED, ttft_target_s=2), CONSENTS, policy=Policy.QUALITY)
    assert names(choice) == [["dense"], ["dense", "w8a8"], ["dense", "w8a8", "depth26"]]
    assert [step.wait_s for step in choice.steps] == [2, 2, inf]
    assert [choice.reason_for(one) for one in MEASURED] == ["quality", "pressure", "pressure"]
    assert names(chosen(offer(*MEASURED), CONSENTS, policy=Policy.QUALITY, degrade=False)) == [["dense"]]
    assert names(chosen(offer(*MEASURED), STRICT, policy=Policy.QUALITY, degrade=True)) == [["dense"]]
    pressed = chosen(offer(*MEASURED), CONSENTS, Now(open=1), policy=Policy.QUALITY)
    assert names(pressed) == [["dense", "w8a8"], ["dense", "w8a8", "depth26"]]


def test_a_floor_that_nothing_reaches() -> None:
    with pytest.raises(InvalidValue):
        chosen(offer(DEPTH, W8A8), quality_floor=0.99)


def test_a_canary_gets_its_share_and_nothing_else() -> None:
    offered = offer(*MEASURED, policy="quality", canary=settings.Canary(variant="w8a8", percent=20))
    assert names(chosen(offered, point=0.19)) == [["w8a8"]]
    assert names(chosen(offered, point=0.2)) == [["dense"]]
    assert names(chosen(offered, CONSENTS, point=0.2)) == [["dense"], ["dense", "depth26"]]
    assert chosen(offered, point=0.1).reason is Reason.CANARY
    assert names(chosen(offered, now=Now(gone=frozenset({"w8a8"})), point=0.1)) == [["dense"]]
    assert names(chosen(offered, point=0.1, quality_floor=0.99)) == [["dense"]]


@given(st.floats(0, 100), st.integers(0, 10**6))
def test_the_share_of_a_canary(percent: float, seed: int) -> None:
    points = [point_of("m", "tenant", f"{seed}-{session}") for session in range(2000)]
    share = sum(point * 100 < percent for point in points) / len(points)
    assert abs(share * 100 - percent) < 5  # 4.5 standard deviations of the widest
    assert points[0] == point_of("m", "tenant", f"{seed}-0")


FACTS = st.builds(
    VariantFacts,
    quality=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]),
    cost=st.sampled_from([0.2, 0.5, 1.0]),
    ttft_s=st.sampled_from([0.0, 0.5, 3.0]),
    passes_gate=st.booleans(),
)


@given(
    st.lists(FACTS, min_size=2, max_size=5),
    st.sampled_from([policy for policy in Policy if policy is not Policy.CASCADE]),
    st.booleans(),
    st.one_of(st.none(), st.booleans()),
    st.sampled_from([0.0, 0.5, 0.95]),
    st.one_of(st.none(), st.sampled_from([0.3, 1.0])),
    st.frozensets(st.sampled_from(["v0", "v1", "v2"])),
    st.integers(0, 4),
    st.floats(0, 1),
)
def test_every_choice(
    facts: list[VariantFacts],
    policy: Policy,
    consents: bool,
    degrade: bool | None,
    floor: float,
    ttft_s: float | None,
    gone: frozenset[str],
    level: int,
    point: float,
) -> None:
    variants = [Variant("m", f"v{at}", (), facts=each) for at, each in enumerate(facts)]
    offered = offer(*variants, canary=settings.Canary(variant="v0", percent=50))
    able = [one for one in offered.variants if one.facts.quality >= floor]
    try:
        choice = chosen(
            offered, Tenant("t", degrade=consents), Now(gone, open=level), point,
            policy=policy, quality_floor=floor, ttft_s=ttft_s, degrade=degrade,
        )  # fmt: skip
    except (InvalidValue, ModelNotFound):
        assert not able
        return
    opened = [one for rung in choice.steps[-1].rungs for one in rung]
    assert all(one.facts.passes_gate for one in opened)
    if len(offered.variants) > 1:
        assert all(one.facts.quality >= floor for one in opened)
    assert len({one.name for one in opened}) == len(opened)
    if not consents or degrade is False:
        assert len(choice.steps) == 1
        assert len(choice.steps[0].rungs) == 1
    assert choice.steps[-1].wait_s == inf
    for before, after in zip(choice.steps, choice.steps[1:], strict=False):
        assert after.rungs[: len(before.rungs)] == before.rungs
    serving = [one for one in able if one.name not in gone]
    if len(offered.variants) > 1 and [one for one in serving if one.name != "v0"]:
        assert any(one in serving for one in choice.meant)


def test_a_cascade_needs_both_of_its_variants() -> None:
    given = settings.Cascade(small="w8a8", large="dense", threshold=0.5)
    model = Model("m", MEASURED, settings.Choosing(cascade=given))
    step = UncertaintyStep(threshold=0.5, escalated_share=0.3, expected_quality=0.9, agreement=0.8)
    calibrated = Uncertainty(measure="entropy", window_tokens=8, top_logprobs=5, items=10, table=(step,))
    cascade = Cascade(W8A8, DENSE, calibrated, 0.5, 8)
    offered = Offer(replace(model, cascade=cascade), MEASURED, is_pinned=False)
    choice = chosen(offered, policy=Policy.CASCADE)
    assert (names(choice), choice.cascade) == ([["w8a8"]], cascade)
    assert [choice.reason_for(one) for one in (W8A8, DENSE)] == [Reason.SURE, Reason.UNSURE]
    for gone, first in (("w8a8", "dense"), ("dense", "w8a8")):
        alone = chosen(offered, now=Now(gone=frozenset({gone})), policy=Policy.CASCADE)
        assert (names(alone), alone.cascade) == ([[first]], None)
    with pytest.raises(InvalidValue):
        chosen(offer(*MEASURED), policy=Policy.CASCADE)
    assert names(chosen(offer(*MEASURED, policy="economy"), Tenant("t", policy=Policy.CASCADE))) == [["w8a8"]]
    assert threshold_of(calibrated, 0.9) == 0.5
    assert threshold_of(calibrated, 0.95) == 0.0


def test_a_ladder_opens_at_once_and_closes_after_a_calm() -> None:
    ladder = Ladder().pressed(0, 10.0, CALM_S)
    assert ladder.level == 1
    assert ladder.pressed(0, 10.1, CALM_S) is ladder
    assert ladder.pressed(1, 10.2, CALM_S).level == 2
    assert ladder.at(14.9, CALM_S) is ladder
    assert ladder.at(15.0, CALM_S).level == 0


@given(st.floats(0.01, 3.0), st.sampled_from([1.0, 5.0, 30.0]))
def test_under_lasting_pressure_a_ladder_hardly_ever_closes(every_s: float, calm_s: float) -> None:
    """Whoever finds only the first rung open finds it too full."""
    ladder, steps, now = Ladder(), 0, 0.0
    until = 40 * CALM_MAX * calm_s / 8
    while now < until:
        before, ladder = ladder, ladder.at(now, calm_s)
        if ladder.level == 0:
            ladder = ladder.pressed(0, now, calm_s)
        steps += ladder.level != before.level or ladder.closed != before.closed
        now += every_s
    assert steps <= 2 * (1 + 4 + until / (CALM_MAX * calm_s))


def test_a_ladder_forgets_an_old_relapse() -> None:
    ladder = Ladder()
    for now in (0.0, 5.0, 15.0):
        ladder = ladder.at(now, CALM_S).pressed(0, now, CALM_S)
    assert ladder.patience == 4
    calm = ladder.at(35.0, CALM_S)
    assert (calm.level, calm.patience) == (0, 4)
    assert calm.at(35.0 + 2 * CALM_MAX * CALM_S, CALM_S) == Ladder()
