"""A headless Chromium, Debian's, and a gateway for it to look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

from tests import debian
from tests.fakes.worker import FakeWorker
from tests.integration.gateway.running import GatewayProcess, issue_keys, model

PACKAGE = "chromium"
PATIENCE_MS = 30_000
"""Only failures wait for it."""
COMPLAINTS = ("Content Security Policy", "TrustedHTML", "Uncaught")


@pytest.fixture(scope="session")
def chromium() -> Path:
    """Where Chromium is: on the machine, or installed now. Skips where neither can be."""
    found = _found()
    if found is None:
        if os.geteuid() != 0:
            pytest.skip("Chromium is not here, and only root can install it")
        try:
            debian.fetch(PACKAGE, _install)
        except debian.Unavailable as error:
            pytest.skip(str(error))
        found = _found()
    if found is None:
        pytest.skip("Debian's package of Chromium was installed, and has no program")
    return Path(found)


def _found() -> str | None:
    return shutil.which(PACKAGE) or shutil.which("chromium-browser")


def _install() -> None:
    if _found() is None:  # another process may have been faster
        options = ["--no-install-recommends", "-o", f"DPkg::Lock::Timeout={debian.FETCH_S // 2}"]
        debian.run("apt-get", "install", "-y", *options, PACKAGE)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(chromium: Path) -> AsyncIterator[Browser]:
    # Its own sandbox cannot be had by root; what it shows here is ours alone.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium, args=arguments, timeout=PATIENCE_MS * 2)
        yield browser
        await browser.close()


@asynccontextmanager
async def opened(context: BrowserContext) -> AsyncIterator[Page]:
    """A page, which must not have complained of anything when it is left: of its policy, or of its own code."""
    complaints: list[str] = []
    page = await context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    yield page
    await page.close()
    assert [complaint for complaint in complaints if any(word in complaint for word in COMPLAINTS)] == []


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page of its own, with a storage of its own, of a desk's size."""
    context = await browser.new_context(viewport={"width": 1360, "height": 900}, reduced_motion="reduce")
    async with opened(context) as page:
        yield page
    await context.close()


@dataclass
class Site:
    """A gateway with two listeners that asks for keys; `narrow` has one slot. `url` is the console's."""

    gateway: GatewayProcess
    worker: FakeWorker
    narrow: FakeWorker
    keys: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.gateway.admin_port}/console"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    keys = await issue_keys(directory / "keys", "acme", admin="operators")
    async with FakeWorker("m") as worker, FakeWorker("narrow") as narrow:
        gateway = GatewayProcess(
            directory,
            [model("m", worker), model("narrow", narrow, max_concurrency=1)],
            admin=True,
            key=keys["acme"],
            admin_key=keys["operators"],
            auth={"enabled": True, "key_files": [str(directory / "keys")]},
            batches={"directory": str(directory / "batches")},
            admission={"queue_timeout_s": 300},
        )
        async with gateway:
            await gateway.ready(worker, narrow)
            yield Site(gateway, worker, narrow, keys)
            narrow.resume()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: SLUICE_PICTURES, or beside the other files of this run."""
    chosen = os.environ.get("SLUICE_PICTURES")
    directory = Path(chosen) if chosen else tmp_path_factory.mktemp("pictures")
    directory.mkdir(parents=True, exist_ok=True)
    return directory
