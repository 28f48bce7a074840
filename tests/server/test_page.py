"""The chat page in headless Chromium: a turn is answered, drafted text is tinted, figures move, all from one host.

With SPECDEC_SCREENSHOT=FILE the page talking to the default model is photographed into FILE: README's picture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Live

sync = pytest.importorskip(
    "playwright.sync_api", reason="pip install playwright; playwright install chromium"
)
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
        except sync.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


def converse(browser: Any, url: str, text: str, limit: int, picture: Path) -> Any:
    """Ask once, wait for the answer's last line and the figures, take the picture; returns the page."""
    page = browser.new_page(viewport={"width": 1200, "height": 760})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.fill("#limit", str(limit))
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant .foot", timeout=60_000)
    sync.expect(page.locator("#tau")).not_to_have_text("\u2013")
    page.screenshot(path=picture)
    assert all(one.startswith((url, "data:")) for one in asked), "the page asks somebody else"
    return page


def test_a_conversation(browser: Any, live: Live, tmp_path: Path) -> None:
    page = converse(browser, live.url, "abcabcabcabc", 80, tmp_path / "page.png")
    assert "tokens" in page.inner_text(".assistant .foot")
    assert page.inner_text(".user") == "abcabcabcabc"
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_the_picture_in_the_readme(browser: Any) -> None:
    target = os.environ.get("SPECDEC_SCREENSHOT")
    if target is None:
        pytest.skip("SPECDEC_SCREENSHOT names no file")
    command = [sys.executable, "-m", "specdec.cli.main", "serve", "--port", "0", "--slots", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://127\S+", line)))
        try:
            page = converse(
                browser, url, "Explain in a few sentences why the sky is blue.", 160, Path(target)
            )
            assert page.query_selector_all(".assistant mark"), "nothing is tinted"
        finally:
            process.terminate()
