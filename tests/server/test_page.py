"""The chat page in headless Chromium: a turn is answered, drafted text is tinted, figures move. Writes a screenshot."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import Live

sync = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright; playwright install chromium"
)


@pytest.mark.browser
def test_a_conversation(live: Live, tmp_path: Path) -> None:
    with sync.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch()
        except sync.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(live.url)
        page.fill("#limit", "80")
        page.fill("#prompt", "abcabcabcabc")
        page.keyboard.press("Enter")
        page.wait_for_selector(".assistant .foot")
        assert "tokens" in page.inner_text(".assistant .foot")
        assert page.inner_text(".user") == "abcabcabcabc"
        page.wait_for_function("document.querySelector('#tau').textContent !== '\u2013'")
        page.screenshot(path=tmp_path / "page.png")
        assert all(url.startswith((live.url, "data:")) for url in asked)
        browser.close()
