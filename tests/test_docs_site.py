"""The documentation as a site: the strict build of `make docs`, and the built pages in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MKDOCS = ROOT / ".venv" / "docs" / "bin" / "python"
NAV = re.compile(r"^nav:\n(?:[ ].*\n)+", re.MULTILINE)
DESKTOP = {"width": 1280, "height": 1000}
PHONE = {"width": 360, "height": 800}
WAIT_MS = 30_000


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a line on stderr for each."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
        """Write nothing."""


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a checkout as `make docs` does."""
    need(None if MKDOCS.exists() else "no MkDocs in .venv/docs (make .venv/docs/installed)")
    return subprocess.run(
        [MKDOCS, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The built site on a server of static files."""
    site = tmp_path_factory.mktemp("site")
    built = build(ROOT, site)
    assert built.returncode == 0, built.stderr
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(site))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def page(chromium: str, url: str) -> Iterator[Page]:
    """One tab for all tests; it fails if a script fails or a request leaves the host."""
    requested: list[str] = []
    faults: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport=DESKTOP, color_scheme="light")  # type: ignore[arg-type]
        opened.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        opened.on("request", lambda request: requested.append(request.url))
        opened.on("pageerror", lambda error: faults.append(str(error)))
        yield opened
        browser.close()
    assert faults == []
    assert {urlsplit(each).netloc for each in requested if not each.startswith("data:")} == {
        urlsplit(url).netloc
    }


def test_broken_links_and_pages_in_no_navigation_fail_the_build(tmp_path: Path) -> None:
    """A link to a missing page, one to a missing heading, and a page in no navigation are each named."""
    shutil.copytree(ROOT / "docs_site", tmp_path / "docs_site", ignore=shutil.ignore_patterns("pages"))
    config = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(NAV.sub("nav: [index.md]\n", config))
    (tmp_path / "README.md").write_text(
        "# Home\n[a](docs/gone.md) [b](docs/orphan.md#nowhere) [c](gone.csv)\n"
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "orphan.md").write_text("# Orphan\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    # What follows a level belongs to it, further lines too.
    warnings = re.findall(r"^WARNING((?:.*\n)(?:[ ].*\n)*)", built.stderr, re.MULTILINE)
    for named in ("'docs/gone.md'", "'orphan.md#nowhere'", "'gone.csv'", "  - orphan.md"):
        assert any(named in warning for warning in warnings), built.stderr


@pytest.mark.browser
def test_readme_is_the_home_and_search_leads_to_a_page(page: Page, url: str, tmp_path: Path) -> None:
    """The README opens with its picture; a word typed into the search leads to the page that explains it."""
    page.goto(url)
    expect(page.locator("article h1")).to_contain_text("SAM3 inference backend")
    picture = page.locator("article img").first
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    search = page.locator("input[name=query]")
    search.click()
    expect(page.locator(".md-search-result__meta")).to_have_text("Type to start searching")  # index loaded
    search.press_sequentially("exemplar")
    result = page.locator(".md-search-result__link").first
    expect(result).to_be_visible()
    page.screenshot(path=tmp_path / "search.png")
    result.click()
    expect(page.locator("article")).to_contain_text("exemplar")


@pytest.mark.browser
def test_gallery_shows_every_picture(page: Page, url: str, tmp_path: Path) -> None:
    """Each option of the table has its heading, and each picture of the gallery loads."""
    page.goto(url)
    page.get_by_role("link", name="Try it", exact=True).first.click()
    page.goto(f"{url}/gallery.html")
    for link in page.locator("article table a").all():
        assert page.locator(str(link.get_attribute("href"))).count() == 1
    images = page.locator("article img")
    widths = images.evaluate_all(
        "all => Promise.all(all.map(image => image.decode().then(() => image.naturalWidth)))"
    )
    assert len(widths) >= 15
    assert all(width > 0 for width in widths)
    page.screenshot(path=tmp_path / "gallery.png", full_page=True)


@pytest.mark.browser
def test_dark_theme_follows_the_reader(page: Page, url: str, tmp_path: Path) -> None:
    """On a light system a reader chooses the dark theme: the page and its diagram become dark."""
    page.goto(f"{url}/architecture.html")
    light, dark = page.locator("img[src*=processes-light]"), page.locator("img[src*=processes-dark]")
    expect(light).to_be_visible()
    expect(dark).to_be_hidden()
    for name in ("Switch to light", "Switch to dark"):
        page.locator(f"label[title='{name}']").click()
    expect(dark).to_be_visible()
    expect(light).to_be_hidden()
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    )
    assert max(red, green, blue) < 80
    page.screenshot(path=tmp_path / "dark.png")


@pytest.mark.browser
def test_lists_and_files_look_as_on_a_code_host(page: Page, url: str) -> None:
    """Lists in lists stay so; links to a CSV, a source and a notebook show their content; docstrings show."""
    page.goto(f"{url}/operations.html")
    expect(page.locator("article ol > li > ul > li", has_text="/etc/sam3/smoke.env")).to_have_count(1)
    page.goto(f"{url}/outputs.html")
    page.get_by_role("link", name="tiles.csv").click()
    expect(page.locator("article table th").first).to_be_visible()
    page.goto(f"{url}/outputs.html")
    page.get_by_role("link", name="examples/outputs.py").click()
    expect(page.locator("article pre")).to_contain_text("def main() -> None:")
    page.goto(url)
    page.get_by_role("link", name="a notebook").click()
    expect(page.locator("article h1")).to_contain_text("Masks in five minutes")
    assert page.locator("article img").evaluate("image => image.naturalWidth") == 640
    page.goto(f"{url}/python-reference.html#sam3_client.Client.segment")
    expect(page.locator("article li", has_text="score_threshold").first).to_contain_text("float | None")


@pytest.mark.browser
def test_pages_fit_a_phone(page: Page, url: str, tmp_path: Path) -> None:
    """At 360 px no page is wider than the screen; wide tables scroll by themselves."""
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    for name in ("index", "gallery", "settings", "benchmarks", "scale", "decisions/model"):
        page.goto(f"{url}/{name}.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
        page.screenshot(path=tmp_path / f"{name.replace('/', '-')}.png")
    page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]
