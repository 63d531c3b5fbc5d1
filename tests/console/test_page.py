"""The console in a browser: by keyboard, while requests wait, with hostile names, and when the gateway is gone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page, Route, expect

from tests.console.conftest import PATIENCE_MS, Site
from tests.console.snapshots import full, sent, snapshot
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.asking import CHAT, chat
from tests.integration.gateway.running import GatewayProcess, model

pytestmark = pytest.mark.asyncio(loop_scope="session")

expect.set_options(timeout=PATIENCE_MS)
PHONE = {"width": 390, "height": 844}
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
LONG = "long-" * 40


async def enter(page: Page, site: Site) -> None:
    """Go to the console with the operator's key."""
    await page.goto(site.url)
    await page.get_by_label("Admin key").fill(site.keys["operators"])
    await page.keyboard.press("Enter")
    await expect(page.locator("#link")).to_have_text("Live")


async def told(page: Page, site: Site, body: bytes) -> None:
    """Go to the console, and have it told this and no more."""

    async def answer(route: Route) -> None:
        await route.fulfill(body=body, content_type="text/event-stream")

    await page.route("**/admin/live", answer)
    await page.goto(site.url)
    await expect(page.locator("#panels")).to_be_visible()


async def tab_to(page: Page, selector: str) -> None:
    """Press Tab until that has the focus, and see that it shows."""
    for _ in range(30):
        await page.keyboard.press("Tab")
        if await page.locator(f"{selector}:focus").count():
            outline = await page.locator(selector).evaluate("element => getComputedStyle(element).outlineStyle")
            assert outline == "solid", f"the focus on {selector} is not to be seen"
            return
    raise AssertionError(f"{selector} cannot be reached by Tab")


async def test_an_operator_comes_in_asks_and_leaves_by_keyboard(page: Page, site: Site, pictures: Path) -> None:
    await page.goto(site.url)
    await expect(page.get_by_label("Admin key")).to_be_focused()
    await expect(page.locator("#panels")).to_be_hidden()
    await page.keyboard.type("sk-wrong")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("opens nothing here")
    await page.screenshot(path=pictures / "wrong-key.png")
    await page.keyboard.type(site.keys["acme"])
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_contain_text("scope admin")
    await page.keyboard.type(site.keys["operators"])
    await page.keyboard.press("Enter")
    await expect(page.locator("#link")).to_have_text("Live")
    await expect(page.get_by_role("row", name=f"127.0.0.1:{site.worker.port}")).to_contain_text("ready")
    assert page.url == site.url
    assert await page.evaluate("[localStorage.length, document.cookie]") == [0, ""]

    await tab_to(page, "#prompt")
    await page.keyboard.press("Control+a")
    await page.keyboard.type(f"one two {HOSTILE}")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator("#progress")).to_contain_text("Done:")
    await expect(page.locator("#answer")).to_contain_text("one two")
    await expect(page.locator("#answer > *")).to_have_count(0)
    for measure in ("#asked-ttft", "#asked-queue"):
        await expect(page.locator(measure)).to_contain_text("s")
    await expect(page.locator("#asked-variant")).to_have_text("v")
    assert await page.title() == "Sluice"

    await page.keyboard.press("Shift+Tab")
    await tab_to(page, "#prompt")
    await page.locator("#forget").focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("Admin key")).to_be_focused()
    assert await page.evaluate("sessionStorage.length") == 0


async def test_who_waits_is_seen_and_a_question_waits_with_them(page: Page, site: Site, pictures: Path) -> None:
    await enter(page, site)
    queue = page.locator("#queue")
    await expect(page.get_by_text("Nobody waits.")).to_be_visible()
    places = [await page.locator(name).bounding_box() for name in ("#workers-title", "#models-title", "#queue-title")]
    site.narrow.hold()
    asked = [asyncio.create_task(site.gateway.http.post(CHAT, json=chat(model="narrow"))) for _ in range(3)]
    try:
        row = queue.get_by_role("row", name="acme")
        await expect(row).to_contain_text("default")
        await expect(row.locator("td").nth(1)).to_have_text("2")
        await expect(page.locator("#waiting")).to_contain_text("2 waiting")
        moved = [
            await page.locator(name).bounding_box() for name in ("#workers-title", "#models-title", "#queue-title")
        ]
        assert moved == places, "what is read moves when something else changes"
        await page.get_by_label("Model", exact=True).select_option("narrow")
        await page.locator("#send").click()
        await expect(page.locator("#progress")).to_have_text("Waiting for a slot: 1 of 1")
        await expect(queue.get_by_role("row", name="operators")).to_be_visible()
        await page.screenshot(path=pictures / "waiting.png", full_page=True)
        assert await violations(page) == []
        await page.emulate_media(color_scheme="dark", reduced_motion="reduce")
        assert await violations(page) == []
    finally:
        site.narrow.resume()
    await asyncio.gather(*asked)
    await expect(page.locator("#progress")).to_contain_text("Done:")
    await expect(page.locator("#asked-queue")).to_contain_text("s")
    await expect(page.locator("#asked-variant")).to_have_text("v")
    await expect(page.get_by_text("Nobody waits.")).to_be_visible()


async def test_a_question_can_be_stopped_and_a_refusal_is_told(page: Page, site: Site) -> None:
    await enter(page, site)
    site.narrow.hold()
    try:
        await page.get_by_label("Model", exact=True).select_option("narrow")
        await page.locator("#send").click()
        await expect(page.locator("#send")).to_be_disabled()
        await site.narrow.wait_for(open=1)
        await page.get_by_role("button", name="Stop").click()
        await expect(page.locator("#progress")).to_have_text("Stopped")
        await site.narrow.wait_for(open=0)
    finally:
        site.narrow.resume()
    await page.get_by_label("Tokens", exact=True).fill("4096")
    await page.locator("#send").click()
    await expect(page.locator("#progress.alarm")).to_contain_text("max_model_len=2048")
    refusal = page.locator("#refusals tbody tr", has_text="rejected · narrow")
    await expect(refusal).to_contain_text("operators")


async def test_names_are_text_and_long_ones_are_cut(page: Page, site: Site, pictures: Path) -> None:
    await told(page, site, sent(full(HOSTILE)))
    for table in ("workers", "models", "queue", "batches", "refusals"):
        await expect(page.locator(f"#{table} tbody tr")).to_have_count(1)
        await expect(page.locator(f"#{table} tbody tr")).to_contain_text(HOSTILE)
    assert await page.locator("main img, main script").count() == 0
    assert await page.title() == "Sluice"
    await page.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
    await told(page, site, sent(full(LONG)))
    assert await page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    cell = page.locator("#workers tbody th")
    await expect(cell).to_have_attribute(
        "title", f"{LONG} ({LONG}\N{NO-BREAK SPACE}· {LONG}\N{NO-BREAK SPACE}· {LONG})"
    )
    await page.screenshot(path=pictures / "long-names.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_keeps_anybody_out(
    page: Page, site: Site, pictures: Path, scheme: Literal["light", "dark"]
) -> None:
    """axe-core's rules, contrast among them: the door, a gateway at rest, a busy one; on a desk and on a phone."""
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.goto(site.url)
    await expect(page.get_by_label("Admin key")).to_be_visible()
    found = await violations(page)
    for name, shown in (("at-rest", snapshot()), ("busy", full("smollm2"))):
        await told(page, site, sent(shown))
        await expect(page.locator("#link")).to_have_text("Disconnected")  # it was told once, and then no more
        for size in ({"width": 1360, "height": 900}, PHONE):
            await page.set_viewport_size({"width": size["width"], "height": size["height"]})
            assert await page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            await page.screenshot(path=pictures / f"{name}-{scheme}-{size['width']}.png", full_page=True)
            found += await violations(page)
    assert found == [], "\n".join(found)


async def violations(page: Page) -> list[str]:
    """What axe-core finds, as one line each."""
    results = await Axe().run(page)
    return [
        f"{violation['id']} ({violation['impact']}): {[node['html'][:160] for node in violation['nodes']][:3]}"
        for violation in results.response["violations"]
    ]


async def test_it_says_when_the_gateway_is_silent_and_goes_on_when_it_is_back(
    page: Page, tmp_path: Path, pictures: Path
) -> None:
    """And where no keys are asked for, it asks for none."""
    async with FakeWorker("m") as worker, GatewayProcess(tmp_path, [model("m", worker)]) as gateway:
        await gateway.ready(worker)
        await page.goto(f"{gateway.url}/console")
        await expect(page.locator("#link")).to_have_text("Live")
        await expect(page.locator("#forget")).to_be_hidden()
        gateway.process.pause()
        try:
            await expect(page.locator("#link")).to_have_text("Disconnected")
            await expect(page.locator("#age")).to_contain_text("last seen")
            await page.screenshot(path=pictures / "silent.png")
        finally:
            gateway.process.resume()
        await expect(page.locator("#link")).to_have_text("Live")
        await expect(page.locator("#age")).to_have_text("")
