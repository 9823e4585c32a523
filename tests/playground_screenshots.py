"""Makes the pictures of docs/playground.md: `python -m tests.playground_screenshots`. Needs Chromium."""

from __future__ import annotations

import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from commands.local_server import ROOT, local_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, ViewportSize

    from commands.local_server import LocalServer

FOLDER = ROOT / "docs" / "playground"
WIDE: ViewportSize = {"width": 1280, "height": 860}
LOW: ViewportSize = {"width": 1280, "height": 640}
NARROW = {"width": 360, "height": 760}


def main() -> None:
    """Start the demo and take all pictures."""
    FOLDER.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium on PATH (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as data, local_server(Path(data)) as server, sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        take_all(browser, server)
        browser.close()


def take_all(browser: Browser, server: LocalServer) -> None:
    """The pictures, each of a page of its own."""
    page = opened(browser, server, viewport=LOW)
    keep(page, "start")
    page.set_viewport_size(WIDE)
    find(page, "Circles", "red circle", "blue circle", "star")
    keep(page, "light")

    page = opened(browser, server, viewport=WIDE, color_scheme="dark")
    find(page, "Stars and rings", "purple star", "orange star")
    page.get_by_role("button", name="Compare").click()
    keep(page, "dark")

    page = opened(browser, server, viewport=NARROW, device_scale_factor=1.5)
    find(page, "Shapes", "triangles")
    keep(page, "narrow")


def opened(browser: Browser, server: LocalServer, **options: Any) -> Page:
    """The page in a context of its own, with the key."""
    page = browser.new_context(**options).new_page()
    page.goto(f"{server.url}/playground#key={server.api_key}")
    expect(page.locator("#server")).to_contain_text("demo checkpoint")
    page.wait_for_load_state("networkidle")
    return page


def find(page: Page, sample: str, *concepts: str) -> None:
    """Choose a sample and find these concepts."""
    page.get_by_role("button", name=sample).click()
    for concept in concepts:
        page.get_by_role("textbox", name="What to find").fill(concept)
        page.get_by_role("textbox", name="What to find").press("Enter")
        answered = page.locator(".chip:not(.open)").filter(has_text=concept)
        expect(answered).to_have_count(1, timeout=60_000)


def keep(page: Page, name: str) -> None:
    """Write what is seen now, once all changes are drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    path = FOLDER / f"{name}.png"
    with Image.open(BytesIO(page.screenshot())) as seen:
        seen.convert("RGB").save(path, optimize=True)
    sys.stdout.write(f"{path}: {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
