"""A browser for tests of the page: Debian's Chromium, driven by Playwright, with an eye on what must not happen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser")
# What Chromium writes of an answer that is no success, or of none: the tests that want one look at the page itself.
NETWORK = "Failed to load resource"


@contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium; the test is skipped where it or Playwright is not installed."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the page's tests need Playwright: pip install .[test]"
    )
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("the page's tests need Chromium, and there is none: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # Without a sandbox it also runs as root, as in containers; it only ever opens a server of the test's own.
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield started
        finally:
            started.close()


class Visit:
    """One person's visit: a context of its own, its page, and what went wrong meanwhile."""

    def __init__(self, started: Any, url: str, **settings: Any) -> None:
        self.url, self.faults, self.foreign = url, list[str](), list[str]()
        self.context = started.new_context(**{"viewport": {"width": 1440, "height": 900}, "locale": "en-GB"} | settings)
        self.context.set_default_timeout(60_000)
        self.context.on("request", self.asked)
        self.page = self.open()

    def open(self, place: str = "create") -> Any:
        """Return a new tab at a place."""
        page = self.context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and self.note(message.text))
        page.on("pageerror", lambda error: self.note(f"{error} {error.stack}"))
        page.goto(f"{self.url}/#/{place}")
        return page

    def note(self, text: str) -> None:
        """Remember what the console says that nobody wants there."""
        if not text.startswith(NETWORK):
            self.faults.append(text)

    def asked(self, request: Any) -> None:
        """Remember what was asked of anybody but the server."""
        if not request.url.startswith((f"{self.url}/", "blob:", "data:")):
            self.foreign.append(request.url)

    def go(self, place: str) -> None:
        """Go to a place as a link would."""
        self.page.evaluate("place => { location.hash = `#/${place}` }", place)

    def until(self, holds: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait until a condition holds, and return what it gave."""
        for _ in range(int(seconds * 10)):
            if found := holds():
                return found
            self.page.wait_for_timeout(100)
        raise AssertionError(f"waited {seconds:g} s in vain; {self.page.locator('body').inner_text()[-1500:]}")

    def end(self) -> None:
        """End the visit; AssertionError where the console complained or something else than the server was asked."""
        self.context.close()
        assert not self.faults, self.faults
        assert not self.foreign, self.foreign


def plays(video: Any) -> bool:
    """Tell whether there is a <video> that shows moving pictures: it has a size, and its time goes on."""
    return video.count() > 0 and bool(
        video.evaluate(
            """async film => {
                const before = film.currentTime
                await film.play().catch(() => {})  // its place may be drawn anew meanwhile
                await new Promise(done => setTimeout(done, 250))
                return film.videoWidth > 0 && film.currentTime !== before
            }"""
        )
    )
